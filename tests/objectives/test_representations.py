"""What layers give, against transformers' own; objectives on it, against dense formulas in fp64."""

from __future__ import annotations

import copy
import math
import sys
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor, nn

from models.errors import Refusal
from models.objectives import attention_relations
from models.objectives.attention_relations import AttentionRelations
from models.objectives.hidden_states import HiddenStates
from models.objectives.representation import RepresentationTerm, Wanted
from models.representations import Capture, check_capture, decoder_layers, projection_widths
from tests.command import ROOT
from tests.objectives.largest_tensor import LargestTensor

LAYERS, WIDTH, HEADS, KV_HEADS, VOCABULARY = 3, 24, 4, 2, 31
COMMON = {
    "vocab_size": VOCABULARY,
    "num_hidden_layers": LAYERS,
    "hidden_size": WIDTH,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
GROUPED = {**COMMON, "intermediate_size": 40, "num_key_value_heads": KV_HEADS}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": GROUPED,
    "mistral": GROUPED,
    "qwen2": GROUPED,
    "qwen3": {**GROUPED, "head_dim": 8},
    "gemma": {**GROUPED, "head_dim": 8},
    "gemma2": {**GROUPED, "head_dim": 8, "sliding_window": 4},
    "phi3": {**GROUPED, **NO_DROPOUT},
    "gpt2": {**COMMON, **NO_DROPOUT},
    "gpt_neox": {**COMMON, "intermediate_size": 40, "attention_dropout": 0.0, "hidden_dropout": 0.0},
    "opt": {**COMMON, "ffn_dim": 40, "word_embed_proj_dim": WIDTH, "dropout": 0.0},
    # As many experts as layers: lists of the same length inside each layer
    "mixtral": {**GROUPED, "num_local_experts": LAYERS},
}
FAMILIES = [*CONFIGS]
FINAL_NORMS = {"gpt2": "ln_f", "gpt_neox": "final_layer_norm", "opt": "decoder.final_layer_norm"}


def config(family: str, **changes: Any) -> transformers.PretrainedConfig:
    return transformers.AutoConfig.for_model(family, **{**CONFIGS[family], **changes})


def model(family: str, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> Any:
    torch.manual_seed(seed)
    made = transformers.AutoModelForCausalLM.from_config(config(family, **changes))
    with torch.no_grad():  # biases start as zeros, which would hide a mistake about them
        for parameter in made.parameters():
            if parameter.dim() == 1:
                parameter += 0.1 * torch.randn_like(parameter)
    return made.to(dtype).eval()


def tokens(rows: int = 2, length: int = 9, seed: int = 0) -> Tensor:
    return torch.randint(1, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def body(made: Any) -> Any:
    return getattr(made, made.base_model_prefix)


def captured(made: Any, ids: Tensor, positions: Tensor, hidden: Any = (), relations: Any = ()) -> Capture:
    with Capture(made, hidden, relations) as seen:
        body(made)(input_ids=ids, position_ids=positions, use_cache=False)
    return seen


def places(ids: Tensor) -> Tensor:
    return torch.arange(ids.shape[1]).expand_as(ids)


# What is captured


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_are_those_transformers_gives(family: str) -> None:
    made, ids = model(family), tokens()
    theirs = body(made)(input_ids=ids, position_ids=places(ids), use_cache=False, output_hidden_states=True)
    hidden = captured(made, ids, places(ids), range(LAYERS + 1)).hidden
    assert list(hidden) == [0, 1, 2, 3]
    for number in range(LAYERS):
        assert torch.equal(hidden[number], theirs.hidden_states[number]), number
    norm = body(made).get_submodule(FINAL_NORMS.get(family, "norm"))
    assert torch.equal(norm(hidden[LAYERS]), theirs.last_hidden_state)
    assert not torch.equal(hidden[LAYERS], theirs.last_hidden_state)


def projected_by_hand(family: str, layer: Any, states: Tensor) -> list[Tensor]:
    if family == "gpt2":
        return list(layer.attn.c_attn(layer.ln_1(states)).split(WIDTH, dim=-1))
    if family == "gpt_neox":
        fused = layer.attention.query_key_value(layer.input_layernorm(states))
        fused = fused.view(*fused.shape[:2], HEADS, 3, WIDTH // HEADS)
        return [fused[:, :, :, part].reshape(*states.shape[:2], WIDTH) for part in range(3)]
    if family == "phi3":
        fused = layer.self_attn.qkv_proj(layer.input_layernorm(states))
        return [fused[..., :24], fused[..., 24:36], fused[..., 36:]]
    norm = layer.self_attn_layer_norm if family == "opt" else layer.input_layernorm
    attention = layer.self_attn
    return [project(norm(states)) for project in (attention.q_proj, attention.k_proj, attention.v_proj)]


@pytest.mark.parametrize("family", FAMILIES)
def test_queries_keys_and_values_are_what_the_projections_give(family: str) -> None:
    made, ids = model(family), tokens()
    seen = captured(made, ids, places(ids), range(LAYERS), [1, 3])
    for number in (1, 3):
        expected = projected_by_hand(family, decoder_layers(made)[number - 1], seen.hidden[number - 1])
        for got, part in zip((seen.queries, seen.keys, seen.values), expected, strict=True):
            assert list(got) == [1, 3]
            assert torch.equal(got[number], part)
        widths = tuple(part.shape[-1] for part in expected)
        assert widths == projection_widths(made.config)


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "gpt_neox", "gemma2", "opt"])
def test_queries_keys_and_values_are_what_attention_works_on(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Position 0 everywhere: nothing is rotated."""
    made, ids = model(family, attn_implementation="eager"), tokens(1)
    home = sys.modules[type(made).__module__]
    real, worked_on = home.eager_attention_forward, []

    def recorder(module: Any, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **words: Any) -> Any:
        worked_on.append([part.transpose(1, 2).flatten(2) for part in (query, key, value)])
        return real(module, query, key, value, *rest, **words)

    monkeypatch.setattr(home, "eager_attention_forward", recorder)
    seen = captured(made, ids, torch.zeros_like(ids), (), range(1, LAYERS + 1))
    assert len(worked_on) == LAYERS
    for number, (queries, keys, values) in enumerate(worked_on, start=1):
        scaled = seen.queries[number] * ((WIDTH // HEADS) ** -0.5 if family == "opt" else 1.0)
        torch.testing.assert_close(scaled, queries)
        torch.testing.assert_close(seen.keys[number], keys)
        torch.testing.assert_close(seen.values[number], values)


def test_rows_that_attention_wanted_end_to_end_are_taken_apart_again() -> None:
    made, ids = model("llama"), tokens(2, 9)
    apart = captured(made, ids, places(ids), [1], [2])
    flat = captured(made, ids.reshape(1, -1), places(ids).reshape(1, -1), [1], [2])
    assert flat.hidden[1].shape == (1, 18, WIDTH)
    flat.reshape(2, 9)
    torch.testing.assert_close(flat.hidden[1], apart.hidden[1])
    torch.testing.assert_close(flat.keys[2], apart.keys[2])


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "gpt_neox", "opt"])
@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
def test_checkpointed_layers_give_the_same_and_the_same_gradients(family: str, inside: bool) -> None:
    """`inside`: backward runs, and so layers run again, while the hooks are still there."""
    ids, results = tokens(), []
    for checkpointed in (False, True):
        made = model(family, torch.float64).train()
        if checkpointed:
            made.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        capture = Capture(made, [0, 2], [1, 3])
        with capture:
            out = body(made)(input_ids=ids, position_ids=places(ids), use_cache=False).last_hidden_state
            held = [capture.hidden[0], capture.hidden[2], capture.queries[1], capture.keys[3], capture.values[3]]
            loss = out.square().mean() + sum(each.pow(3).mean() for each in held)
            if inside:
                before = [id(each) for each in (*capture._hidden.values(), *capture._projected[3].values())]
                loss.backward()
                after = [id(each) for each in (*capture._hidden.values(), *capture._projected[3].values())]
                assert before == after
        if not inside:
            loss.backward()
        results.append([each.detach() for each in held] + [p.grad for p in made.parameters() if p.grad is not None])
    assert len(results[0]) > 20
    for plain, again in zip(*results, strict=True):
        torch.testing.assert_close(again, plain, rtol=1e-10, atol=1e-14)


def hooks_of(made: nn.Module) -> int:
    return sum(len(each._forward_hooks) + len(each._forward_pre_hooks) for each in made.modules())


def test_hooks_are_gone_afterwards_also_after_an_error() -> None:
    made = model("llama")
    before = hooks_of(made)
    with Capture(made, [0, 1], [1]):
        assert hooks_of(made) > before
    assert hooks_of(made) == before
    with pytest.raises(IndexError):
        captured(made, torch.tensor([[VOCABULARY + 5]]), torch.tensor([[0]]), [0, 1], [1])
    assert hooks_of(made) == before


def test_the_newest_forward_counts_and_a_failed_one_leaves_nothing_of_the_one_before() -> None:
    made = model("llama")
    with Capture(made, [1], []) as capture:
        for seed in (0, 1):
            body(made)(input_ids=tokens(seed=seed), use_cache=False)
        assert torch.equal(capture.hidden[1], captured(made, tokens(seed=1), places(tokens()), [1]).hidden[1])
        with pytest.raises(IndexError):
            body(made)(input_ids=torch.tensor([[VOCABULARY + 5]]))
        with pytest.raises(RuntimeError, match="layer 1 gave nothing"):
            _ = capture.hidden


def test_what_was_captured_lives_no_longer_than_the_capture_nor_than_clear() -> None:
    made, ids = model("llama").train(), tokens()
    for let_go in (Capture.clear, lambda _: None):
        seen = captured(made, ids, places(ids), [1], [1])
        alive = [weakref.ref(seen.hidden[1]), weakref.ref(seen.queries[1])]
        assert all(each() is not None for each in alive)
        let_go(seen)
        if let_go is not Capture.clear:
            del seen
        assert all(each() is None for each in alive)  # at once: no cycle waits for the collector


def test_a_capture_is_entered_once_and_may_be_entered_again_after() -> None:
    made, ids = model("llama"), tokens()
    capture = Capture(made, [1], [])
    with capture, pytest.raises(RuntimeError, match="already entered"):
        capture.__enter__()
    with capture:
        body(made)(input_ids=ids, use_cache=False)
    assert capture.hidden[1].shape == (2, 9, WIDTH)


@pytest.mark.parametrize(("hidden", "relations", "message"), [([4], [], "layer 4"), ([], [0], "layer 0")])
def test_layers_that_are_not_there_are_refused(hidden: list[int], relations: list[int], message: str) -> None:
    with pytest.raises(Refusal, match=f"{message}: LlamaForCausalLM has .* to 3"):
        Capture(model("llama"), hidden, relations)


def test_projections_that_are_not_understood_are_refused_and_named_from_the_config_alone() -> None:
    fused = transformers.AutoConfig.for_model("gpt_bigcode", n_layer=2, n_embd=16, n_head=2, vocab_size=VOCABULARY)
    check_capture(fused, [0, 1, 2], [])
    with pytest.raises(Refusal, match="layer 2, GPTBigCodeBlock: no queries, keys and values"):
        check_capture(fused, [], [2])


def test_projections_that_give_more_than_queries_are_refused() -> None:
    """As gated attention does, whose q_proj gives a gate beside each query."""
    made = model("llama")
    made.model.layers[1].self_attn.q_proj = nn.Linear(WIDTH, 2 * WIDTH)
    with pytest.raises(Refusal, match=r"layer 2, LlamaDecoderLayer: its projections give \(48, 12, 12\)"):
        Capture(made, [], [2])


def test_a_family_without_one_list_of_layers_is_refused_and_named() -> None:
    made = model("llama")
    made.model.more = nn.ModuleList([nn.Identity() for _ in range(LAYERS)])
    with pytest.raises(Refusal, match="LlamaForCausalLM: 2 lists of 3 layers"):
        decoder_layers(made)


# Losses, on captures given by hand


class Given(Capture):
    """A capture that no model filled."""

    def __init__(self, **tensors: dict[int, Tensor]) -> None:
        self.tensors = tensors

    def reshape(self, batch: int, length: int) -> None:
        self.rows = (batch, length)

    hidden = property(lambda self: self.tensors["hidden"])  # type: ignore[assignment]
    queries = property(lambda self: self.tensors["queries"])  # type: ignore[assignment]
    keys = property(lambda self: self.tensors["keys"])  # type: ignore[assignment]
    values = property(lambda self: self.tensors["values"])  # type: ignore[assignment]


STUDENT = config("llama")
TEACHER = config("llama", num_hidden_layers=5, hidden_size=32, num_attention_heads=8, num_key_value_heads=4)
ROWS, LENGTH, KINDS = 2, 7, ("queries", "keys", "values")
# Two documents, one of which begins in mid-air as truncated ones do, and padding; one document to the end
POSITIONS = torch.tensor([[0, 1, 2, 5, 6, 7, 0], [0, 1, 2, 3, 4, 5, 6]])
DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1, 1, 2], [0] * 7])
WEIGHTS = torch.tensor([[1.0, 1, 0, 0.5, 1, 0, 0], [0, 1, 1, 2, 1, 0, 0]])


class Case:
    """Random captures of both models at every layer."""

    def __init__(self, dtype: torch.dtype = torch.float64, student: Any = STUDENT, teacher: Any = TEACHER) -> None:
        generator = torch.Generator().manual_seed(0)
        self.sides: list[dict[str, dict[int, Tensor]]] = []
        for which in (student, teacher):
            widths = {"hidden": which.hidden_size, **dict(zip(KINDS, projection_widths(which), strict=True))}
            self.sides.append(
                {
                    kind: {
                        number: torch.randn(ROWS, LENGTH, width, generator=generator, dtype=torch.float64)
                        .mul(2)
                        .to(dtype)
                        .requires_grad_()
                        for number in range(which.num_hidden_layers + 1)
                    }
                    for kind, width in widths.items()
                }
            )
        self.student, self.teacher = (Given(**side) for side in self.sides)

    def inputs(self, kinds: Any, numbers: Any) -> list[Tensor]:
        return [self.sides[0][kind][number] for kind in kinds for number in numbers]

    def teach_itself(self) -> None:
        self.teacher = self.student


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def assert_close(got: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for mine, other in zip(got, expected, strict=True):
        assert (mine.double() - other.double()).abs().max() <= tolerance * other.abs().max().clamp_min(1e-30)


def dense_distance(term: HiddenStates, module: Any, case: Case, pairs: list[tuple[int, int]]) -> Tensor:
    """A loop over tokens, by PyTorch's own losses."""
    total = torch.zeros((), dtype=torch.float64)
    for at, (ours, theirs) in enumerate(pairs):
        for row, place in WEIGHTS.nonzero().tolist():
            mine = case.student.hidden[ours][row, place].double()
            other = case.teacher.hidden[theirs][row, place].detach().double()
            if term.projection:
                mine = module.projections[at].weight.double() @ mine
            if term.normalise:
                mine, other = ((each - each.mean()) / (each.var(correction=0) + 1e-5).sqrt() for each in (mine, other))
            if term.kind == "mse":
                value = F.mse_loss(mine, other)
            else:
                value = 1 - F.cosine_similarity(mine, other, dim=0)
            total = total + WEIGHTS[row, place] * value / len(pairs)
    return total


LAYER_CHOICES = [(None, [(1, 2), (2, 3), (3, 5)]), ([[0, 0], [3, 1], [3, 5]], [(0, 0), (3, 1), (3, 5)])]


@pytest.mark.parametrize(("layers", "pairs"), LAYER_CHOICES)
@pytest.mark.parametrize("kind", ["mse", "cosine"])
@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
)
def test_distance_of_hidden_states_equals_the_dense_formula(
    layers: Any, pairs: Any, kind: str, normalise: bool, dtype: torch.dtype, tolerance: float
) -> None:
    term, case = HiddenStates(kind, layers, normalise=normalise), Case(dtype)
    module: Any = term.build(STUDENT, TEACHER, seed=3).to(dtype)
    inputs = [*case.inputs(["hidden"], sorted({ours for ours, _ in pairs})), *module.parameters()]
    total = module(case.student, case.teacher, POSITIONS, WEIGHTS)
    expected = dense_distance(term, module, case, pairs)
    assert total.dtype == wide(dtype)
    assert_close(
        [total, *torch.autograd.grad(total, inputs)], [expected, *torch.autograd.grad(expected, inputs)], tolerance
    )


def dense_relations(case: Case, kinds: Any, heads: int, pairs: list[tuple[int, int]]) -> Tensor:
    """PyTorch's own softmax and kl_div, one row, head and query at a time, on the tokens that the query sees."""
    total = torch.zeros((), dtype=torch.float64)
    for ours, theirs in pairs:
        for kind in kinds:
            mine, other = (
                list(side[number].double().chunk(heads, dim=-1))
                for side, number in ((getattr(case.student, kind), ours), (getattr(case.teacher, kind), theirs))
            )
            for row, place in WEIGHTS.nonzero().tolist():
                seen = [at for at in range(place + 1) if DOCUMENTS[row, at] == DOCUMENTS[row, place]]
                for student, teacher in zip(mine, other, strict=True):
                    logs = [
                        F.log_softmax(each[row, seen] @ each[row, place] / math.sqrt(each.shape[-1]), dim=0)
                        for each in (student, teacher.detach())
                    ]
                    value = F.kl_div(logs[0], logs[1], reduction="sum", log_target=True)
                    total = total + WEIGHTS[row, place] * value / (heads * len(kinds) * len(pairs))
    return total


@pytest.fixture(params=[1, 3, 1000])
def rows_of_a_block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(attention_relations._BLOCK_BYTES, "cpu", 4 * 4 * LENGTH * request.param)


@pytest.mark.parametrize(("layers", "pairs"), [(None, [(3, 5)]), ([[1, 5], [3, 2]], [(1, 5), (3, 2)])])
@pytest.mark.parametrize("kinds", [KINDS, ("keys",)])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
)
@pytest.mark.usefixtures("rows_of_a_block")
def test_divergence_of_relations_equals_the_dense_formula(
    layers: Any, pairs: Any, kinds: Any, dtype: torch.dtype, tolerance: float
) -> None:
    term, case = AttentionRelations(kinds, 4, layers), Case(dtype)
    module = term.build(STUDENT, TEACHER, seed=0)
    assert not list(module.parameters())
    inputs = case.inputs(kinds, [ours for ours, _ in pairs])
    total = module(case.student, case.teacher, POSITIONS, WEIGHTS)
    expected = dense_relations(case, kinds, 4, pairs)
    assert total.dtype == wide(dtype)
    assert_close(
        [total, *torch.autograd.grad(total, inputs)], [expected, *torch.autograd.grad(expected, inputs)], tolerance
    )


TERMS: list[Any] = [
    HiddenStates(),
    HiddenStates("cosine", normalise=True),
    HiddenStates("cosine", [[2, 4]]),
    AttentionRelations(relation_heads=4),
    AttentionRelations(["values"], 2, [[1, 3], [3, 5]]),
]
terms = pytest.mark.parametrize("term", TERMS, ids=lambda term: f"{term.name}-{TERMS.index(term)}")


def built(term: Any, dtype: torch.dtype = torch.float64, student: Any = STUDENT, teacher: Any = TEACHER) -> Any:
    return term.build(student, teacher, seed=3).to(dtype)


def leaves(term: Any, case: Case) -> list[Tensor]:
    wanted = term.wanted(STUDENT, TEACHER)
    return [
        *case.inputs(["hidden"], wanted.student_hidden),
        *case.inputs(getattr(term, "relations", []), wanted.student_relations),
    ]


@terms
def test_finite_differences_agree_with_the_gradient(term: Any) -> None:
    case, module = Case(), built(term)
    inputs = [*leaves(term, case), *module.parameters()]
    gradients = torch.autograd.grad(module(case.student, case.teacher, POSITIONS, WEIGHTS), inputs)
    for at, (tensor, gradient) in enumerate(zip(inputs, gradients, strict=True)):
        direction = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(at), dtype=torch.float64)
        values = []
        with torch.no_grad():
            for step in (1e-6, -2e-6, 1e-6):
                tensor += step * direction
                values.append(module(case.student, case.teacher, POSITIONS, WEIGHTS))
        assert_close([(gradient * direction).sum()], [(values[0] - values[1]) / 2e-6], 1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(
    "term",
    [
        HiddenStates(projection=False),
        HiddenStates("cosine", projection=False),
        HiddenStates("mse", [[1, 1]], False, True),
        AttentionRelations(relation_heads=4),
    ],
)
def test_a_model_with_itself_has_value_zero_and_gradient_zero(term: Any, dtype: torch.dtype, autocast: bool) -> None:
    case = Case(dtype)
    case.teach_itself()
    module = built(term, dtype, STUDENT, STUDENT)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        total = module(case.student, case.teacher, POSITIONS, WEIGHTS)
    assert total == 0
    assert total.dtype == wide(dtype)
    for gradient in torch.autograd.grad(total, leaves(term, case), allow_unused=True):
        assert gradient is None or (gradient == 0).all()


@terms
def test_under_autocast_only_the_projection_is_bf16(term: Any) -> None:
    case, module = Case(torch.float32), built(term, torch.float32)
    plain = module(case.student, case.teacher, POSITIONS, WEIGHTS)
    with torch.autocast("cpu", torch.bfloat16):
        total = module(case.student, case.teacher, POSITIONS, WEIGHTS)
    assert total.dtype == torch.float32
    if isinstance(term, HiddenStates):
        assert total != plain
        assert_close([total], [plain], 1e-2)
    else:
        assert total == plain
    gradients = torch.autograd.grad(total, [*leaves(term, case), *module.parameters()])
    assert all(gradient.dtype == torch.float32 for gradient in gradients)


@terms
def test_states_in_bf16_meet_a_projection_in_fp32(term: Any) -> None:
    case, module = Case(torch.bfloat16), built(term, torch.float32)
    total = module(case.student, case.teacher, POSITIONS, WEIGHTS)
    gradients = torch.autograd.grad(total, leaves(term, case))
    assert total.dtype == torch.float32
    assert all(gradient.dtype == torch.bfloat16 for gradient in gradients)


@terms
def test_the_teacher_gets_no_gradient(term: Any) -> None:
    case = Case()
    built(term)(case.student, case.teacher, POSITIONS, WEIGHTS).backward()
    assert all(t.grad is None for layers in case.sides[1].values() for t in layers.values())
    assert all(t.grad is not None for t in leaves(term, case))


@terms
def test_without_supervised_tokens_value_and_gradients_are_zero(term: Any) -> None:
    case, module = Case(), built(term)
    total = module(case.student, case.teacher, POSITIONS, torch.zeros_like(WEIGHTS))
    assert total == 0
    gradients = torch.autograd.grad(total, [*leaves(term, case), *module.parameters()])
    assert all((gradient == 0).all() for gradient in gradients)


@terms
def test_without_a_graph_the_value_is_the_same(term: Any) -> None:
    case, module = Case(), built(term)
    with torch.no_grad():
        value = module(case.student, case.teacher, POSITIONS, WEIGHTS)
    assert value == module(case.student, case.teacher, POSITIONS, WEIGHTS)
    assert not value.requires_grad


@terms
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e4])
def test_what_no_supervised_token_sees_changes_nothing(term: Any, poison: float) -> None:
    """Hidden states: any unsupervised position. Relations: those after a document's last supervised token, and
    padding; earlier ones are seen, as attention sees a prompt."""
    unseen = WEIGHTS == 0
    if isinstance(term, AttentionRelations):
        unseen = torch.tensor([[False] * 2 + [True] + [False] * 2 + [True] * 2, [False] * 5 + [True] * 2])
    results = []
    for spoil in (False, True):
        case, module = Case(), built(term)
        if spoil:
            with torch.no_grad():
                for tensor in (t for side in case.sides for layers in side.values() for t in layers.values()):
                    tensor[unseen] = poison
        total = module(case.student, case.teacher, POSITIONS, WEIGHTS)
        inputs = leaves(term, case)
        gradients = torch.autograd.grad(total, [*inputs, *module.parameters()])
        assert all((gradient[unseen] == 0).all() for gradient in gradients[: len(inputs)])
        results.append([total, *gradients])
    assert all(torch.equal(clean, spoilt) for clean, spoilt in zip(*results, strict=True))


@terms
def test_weights_multiply_and_sums_add(term: Any) -> None:
    case, module = Case(), built(term)
    whole = module(case.student, case.teacher, POSITIONS, WEIGHTS)
    apart = torch.zeros((), dtype=torch.float64)
    for row, place in WEIGHTS.nonzero().tolist():
        one = torch.zeros_like(WEIGHTS)
        one[row, place] = 1
        apart += WEIGHTS[row, place] * module(case.student, case.teacher, POSITIONS, one)
    assert_close([whole], [apart], 1e-12)


def test_no_relation_of_a_whole_row_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, length, heads, queries = 2, 256, 4, 16
    monkeypatch.setitem(attention_relations._BLOCK_BYTES, "cpu", 4 * heads * length * queries)
    sides = [
        Given(**{kind: {1: torch.randn(rows, length, heads, requires_grad=True)} for kind in KINDS}) for _ in range(2)
    ]
    module = AttentionRelations(relation_heads=heads, layers=[[1, 1]]).build(STUDENT, TEACHER, 0)
    positions = torch.arange(length).expand(rows, length)
    with LargestTensor() as largest:
        module(*sides, positions, torch.ones(rows, length)).backward()
    assert largest.elements == heads * queries * length < length * length


def test_a_second_backward_through_relations_is_refused_and_not_wrong() -> None:
    case = Case()
    total = built(AttentionRelations(relation_heads=4))(case.student, case.teacher, POSITIONS, WEIGHTS)
    (total / 3).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (total / 3).backward()


# Projections


def test_projections_are_the_same_for_the_same_seed_and_disturb_no_one_elses_draws() -> None:
    term = HiddenStates()
    torch.manual_seed(7)
    undisturbed = torch.rand(3)
    torch.manual_seed(7)
    one = built(term, torch.float32)
    assert torch.equal(torch.rand(3), undisturbed)
    another = built(term, torch.float32)
    other = term.build(STUDENT, TEACHER, seed=4)
    assert [tuple(p.shape) for p in one.parameters()] == [(32, 24)] * 3
    assert all(isinstance(each, nn.Linear) and each.bias is None for each in one.projections)
    assert all(torch.equal(*pair) for pair in zip(one.parameters(), another.parameters(), strict=True))
    assert not any(torch.equal(*pair) for pair in zip(one.parameters(), other.parameters(), strict=True))
    assert not torch.equal(one.projections[0].weight, one.projections[1].weight)
    assert not list(HiddenStates(projection=False).build(STUDENT, STUDENT, 0).parameters())


# With real models


def supervised(ids: Tensor) -> Tensor:
    return (ids % 3 != 0).double()


def run(
    term: Any, student: Any, teacher: Any, ids: Tensor, positions: Tensor, weights: Tensor, flat: bool = False
) -> tuple[Tensor, list[Tensor]]:
    """Value and gradients by the student's parameters, as the training step will have them."""
    wanted, module = term.wanted(student.config, teacher.config), term.build(student.config, teacher.config, 3)
    module = module.to(next(student.parameters()).dtype)
    student.zero_grad()
    with (
        Capture(student, wanted.student_hidden, wanted.student_relations) as ours,
        Capture(teacher, wanted.teacher_hidden, wanted.teacher_relations) as theirs,
    ):
        shape = (1, -1) if flat else ids.shape
        for made in (student, teacher):
            body(made)(input_ids=ids.reshape(shape), position_ids=positions.reshape(shape), use_cache=False)
        total = module(ours, theirs, positions, weights)
        total.backward()
    gradients = [p.grad.clone() for p in student.parameters() if p.grad is not None]
    return total.detach(), [*gradients, *(p.grad for p in module.parameters())]


REAL = [HiddenStates(), HiddenStates("cosine", [[1, 4], [2, 5]]), AttentionRelations(relation_heads=4)]
PAIRS = [
    ("llama", "llama", {}),
    ("qwen3", "phi3", {"num_key_value_heads": 8}),
    ("gpt2", "gemma2", {}),
    ("gpt_neox", "opt", {"word_embed_proj_dim": 32}),
    ("opt", "gpt2", {}),
]


def two(families: Any, dtype: torch.dtype = torch.float64) -> tuple[Any, Any]:
    ours, theirs, changes = families
    shape: dict[str, Any] = {"num_hidden_layers": 5, "hidden_size": 32, "num_attention_heads": 8}
    if "num_key_value_heads" in CONFIGS[theirs]:
        shape["num_key_value_heads"] = 4
    return model(ours, dtype, 1), model(theirs, dtype, 2, **{**shape, **changes}).requires_grad_(False)


@pytest.mark.parametrize("families", PAIRS, ids=lambda pair: f"{pair[0]}-{pair[1]}")
@pytest.mark.parametrize("term", REAL, ids=lambda term: term.name)
def test_a_student_of_other_depth_width_heads_and_family_learns(term: Any, families: Any) -> None:
    student, teacher = two(families)
    term.check(student.config, teacher.config)
    ids = tokens()
    before, gradients = run(term, student, teacher, ids, places(ids), supervised(ids))
    assert before > 0
    assert any((gradient != 0).any() for gradient in gradients)
    norm = torch.stack([gradient.square().sum() for gradient in gradients]).sum().sqrt()
    with torch.no_grad():
        for parameter in student.parameters():
            if parameter.grad is not None:
                parameter -= 1e-2 / norm * parameter.grad
    after, _ = run(term, student, teacher, ids, places(ids), supervised(ids))
    assert after < before


@pytest.mark.parametrize("term", REAL, ids=lambda term: term.name)
def test_documents_of_a_packed_row_are_worth_what_they_are_worth_alone(term: Any) -> None:
    student, teacher = two(PAIRS[0])
    ids, cut = tokens(1, 11), 4
    positions = torch.cat([torch.arange(cut), torch.arange(11 - cut)])[None]
    packed, packed_gradients = run(term, student, teacher, ids, positions, supervised(ids))
    sums = [torch.zeros_like(packed), *(torch.zeros_like(each) for each in packed_gradients)]
    for part in (slice(0, cut), slice(cut, None)):
        alone, gradients = run(term, student, teacher, ids[:, part], positions[:, part], supervised(ids[:, part]))
        assert alone > 0
        sums = [total + each for total, each in zip(sums, [alone, *gradients], strict=True)]
    assert_close([packed, *packed_gradients], sums, 1e-9)


@pytest.mark.parametrize("term", REAL, ids=lambda term: term.name)
@pytest.mark.parametrize("how", ["checkpointed", "flat", "padded"])
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
def test_checkpointing_flattened_rows_and_padding_change_nothing(term: Any, how: str) -> None:
    student, teacher = two(PAIRS[0])
    ids = tokens()
    positions, weights = places(ids), supervised(ids)
    expected, expected_gradients = run(term, student, teacher, ids, positions, weights)
    if how == "checkpointed":
        student.train().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if how == "padded":
        ids, weights = F.pad(ids, (3, 2)), F.pad(weights, (3, 2))
        positions = torch.cat([torch.arange(3).expand(2, 3), positions, torch.arange(2).expand(2, 2)], dim=1)
    got, gradients = run(term, student, teacher, ids, positions, weights, flat=how == "flat")
    assert_close([got], [expected], 1e-10)
    for mine, other in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("term", [HiddenStates(projection=False), AttentionRelations(relation_heads=4)])
def test_a_model_that_teaches_itself_learns_nothing(term: Any) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        student = model("gemma2", dtype)
        teacher = copy.deepcopy(student).requires_grad_(False)
        ids = tokens()
        total, gradients = run(term, student, teacher, ids, places(ids), supervised(ids))
        assert total == 0
        assert gradients
        assert all((gradient == 0).all() for gradient in gradients)


# What is asked for, and what is refused


def test_terms_ask_for_the_layers_they_compare() -> None:
    assert HiddenStates().wanted(STUDENT, TEACHER) == Wanted((1, 2, 3), (2, 3, 5))
    assert HiddenStates(layers=[[3, 0], [1, 0]]).wanted(STUDENT, TEACHER) == Wanted((1, 3), (0,))
    assert HiddenStates().wanted(TEACHER, STUDENT) == Wanted((1, 2, 3, 4, 5), (1, 2, 3))
    assert AttentionRelations().wanted(STUDENT, TEACHER) == Wanted((), (), (3,), (5,))
    both = HiddenStates(layers=[[1, 1]]).wanted(STUDENT, TEACHER) | AttentionRelations().wanted(STUDENT, TEACHER)
    assert both == Wanted((1,), (1,), (3,), (5,))


@pytest.mark.parametrize("name", ["hidden_states", "attention_relations"])
def test_the_yaml_makes_the_term_with_its_defaults(name: str) -> None:
    choice = OmegaConf.load(ROOT / "conf" / "auxiliary" / f"{name}.yaml")
    made = instantiate(choice)
    assert isinstance(made, RepresentationTerm)
    assert made == type(made)()
    assert made.name == name
    pair = instantiate(choice, layers=[[1, 2]])
    assert pair == type(pair)(layers=[[1, 2]])
    hash(pair)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: HiddenStates("l1"), "hidden_states.kind=l1: need one of mse, cosine"),
        (lambda: HiddenStates(weight=0.0), "hidden_states.weight=0"),
        (lambda: HiddenStates(layers=[[1, 2, 3]]), "need .student layer, teacher layer. pairs"),
        (lambda: HiddenStates(layers=[]), "need .student layer, teacher layer. pairs"),
        (lambda: AttentionRelations(["query"]), "attention_relations.relations=.'query'.: need one or more of queries"),
        (lambda: AttentionRelations(["keys", "keys"]), "each once"),
        (lambda: AttentionRelations([]), "need one or more"),
        (lambda: AttentionRelations(relation_heads=0), "relation_heads=0"),
        (lambda: AttentionRelations(weight=-1.0), "attention_relations.weight=-1"),
    ],
)
def test_values_that_mean_nothing_are_refused(make: Any, message: str) -> None:
    with pytest.raises(Refusal, match=message):
        make()


@pytest.mark.parametrize(
    ("term", "message"),
    [
        (HiddenStates(projection=False), "states are 24 wide and the teacher's 32"),
        (HiddenStates(layers=[[4, 1]]), "student layer 4 is not there; the student has 0 to 3"),
        (HiddenStates(layers=[[3, 6]]), "teacher layer 6 is not there; the teacher has 0 to 5"),
        (AttentionRelations(layers=[[0, 1]]), "student layer 0 is not there; the student has 1 to 3"),
        (
            AttentionRelations(relation_heads=8),
            r"relation_heads=8: does not divide every width \(student's queries 24, student's keys 12, "
            r"student's values 12, teacher's queries 32, .*\); these do: 1, 2, 4$",
        ),
    ],
)
def test_what_cannot_be_compared_is_refused_from_the_configs(term: Any, message: str) -> None:
    with pytest.raises(Refusal, match=message):
        term.check(STUDENT, TEACHER)


def test_relation_heads_need_to_divide_only_the_widths_that_are_compared() -> None:
    AttentionRelations(["queries"], 8).check(STUDENT, TEACHER)


def test_a_family_whose_projections_are_not_understood_is_refused_before_weights_are_read() -> None:
    fused = transformers.AutoConfig.for_model("gpt_bigcode", n_layer=2, n_embd=16, n_head=2, vocab_size=VOCABULARY)
    with pytest.raises(Refusal, match="GPTBigCodeBlock"):
        AttentionRelations(["queries"], 8).check(fused, TEACHER)
    HiddenStates().check(fused, TEACHER)
