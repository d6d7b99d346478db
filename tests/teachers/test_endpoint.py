"""A served teacher against the same model in this process; servers that stumble, die and come back."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import models.teachers.connection
import models.teachers.endpoint
from models.errors import Refusal
from models.teachers.dialects.dialect import Generation
from models.teachers.endpoint import Endpoint
from tests.serving import ServerProcess, free_port

V = 60
ROOT = Path(__file__).resolve().parents[2]
Scored = dict[int, tuple[np.ndarray, np.ndarray]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=V, num_key_value_heads=2, max_position_embeddings=128, **shape)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.mul_(8)  # far from uniform, so that ranks are sure
    path = tmp_path_factory.mktemp("served") / "model"
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def truth(folder: Path) -> Callable[[list[int]], torch.Tensor]:
    model = LlamaForCausalLM.from_pretrained(folder).eval()

    @torch.no_grad()
    def logprobs(ids: list[int]) -> torch.Tensor:
        return model(torch.tensor([ids])).logits[0].log_softmax(-1)

    return logprobs


class Served(ServerProcess):
    """With what it counted, and the product's client of it."""

    def count(self, what: str) -> int:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/count") as answer:
            return int(json.load(answer)[what])

    def endpoint(self, place: str = "", **values: Any) -> Endpoint:
        prefix = f"/{place}" if place else ""
        return Endpoint(f"http://127.0.0.1:{self.port}{prefix}/v1", **{"top_k": 7, "concurrency": 4, **values})


@pytest.fixture(scope="module")
def calm(folder: Path) -> Iterator[Served]:
    server = Served(folder, "--max-logprobs", str(V))
    yield server
    server.kill()


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models.teachers.connection, "FIRST_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(models.teachers.connection, "LONGEST_PAUSE_SECONDS", 0.5)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def some_pieces(count: int = 12, seed: int = 0, longest: int = 30) -> dict[int, list[int]]:
    numbers = random.Random(seed)
    return {key: [numbers.randrange(V) for _ in range(numbers.randrange(2, longest))] for key in range(count)}


def scored(endpoint: Endpoint, pieces: dict[int, list[int]]) -> Scored:
    answers = list(endpoint.score(pieces.items()))
    assert len(answers) == len(pieces)
    return {key: (ids, values) for key, ids, values in answers}


def check_against(
    truth: Callable[[list[int]], torch.Tensor], pieces: dict[int, list[int]], got: Scored, k: int
) -> None:
    assert got.keys() == pieces.keys()
    for key, (ids, values) in got.items():
        expected = truth(pieces[key])[:-1]
        best = expected.topk(k)
        assert ids.dtype == np.int64
        assert values.dtype == np.float32
        assert ids.shape == values.shape == (len(pieces[key]) - 1, k)
        np.testing.assert_array_equal(ids, best.indices.numpy())
        np.testing.assert_allclose(values, best.values.numpy(), atol=1e-5, rtol=0)


SCORING = ("vllm", "openai", "llama.cpp")


@pytest.mark.parametrize("k", [1, 7, V])
@pytest.mark.parametrize("dialect", SCORING)
def test_scores_are_the_models_own_log_softmax(dialect: str, k: int, calm: Served, truth: Any) -> None:
    pieces = some_pieces()
    check_against(truth, pieces, scored(calm.endpoint(dialect, top_k=k), pieces), k)


@pytest.mark.parametrize("dialect", SCORING)
def test_naming_the_dialect_gives_what_finding_it_out_gives(dialect: str, calm: Served, truth: Any) -> None:
    pieces = some_pieces(3)
    told = calm.endpoint(dialect, dialect=dialect, model="tiny")
    check_against(truth, pieces, scored(told, pieces), 7)
    assert told.ask().model == "tiny"


def test_the_server_is_recognised(calm: Served) -> None:
    kinds = {dialect: calm.endpoint(dialect).ask().kind for dialect in ("vllm", "llama.cpp", "tgi", "openai")}
    assert kinds == {"vllm": "vllm", "llama.cpp": "llama.cpp", "tgi": "tgi", "openai": "unknown"}
    assert calm.endpoint("vllm").ask().model == "tiny"


def test_a_vocabulary_smaller_than_k_is_told_whole(calm: Served, truth: Any) -> None:
    pieces = some_pieces(3)
    check_against(truth, pieces, scored(calm.endpoint("llama.cpp", top_k=500), pieces), V)


@pytest.mark.parametrize("concurrency", [1, 8])
def test_concurrency_changes_nothing_and_connections_are_kept(concurrency: int, calm: Served, truth: Any) -> None:
    pieces, before = some_pieces(40), calm.count("connections")
    check_against(truth, pieces, scored(calm.endpoint(concurrency=concurrency), pieces), 7)
    assert calm.count("connections") - before <= concurrency + 1  # one is the counting itself


def test_pieces_are_read_as_they_are_needed(calm: Served) -> None:
    read = 0

    def endless() -> Iterator[tuple[int, list[int]]]:
        nonlocal read
        while True:
            read += 1
            yield read, [1, 2, 3]

    answers = calm.endpoint(concurrency=3).score(endless())
    assert read == 0
    for _ in range(5):
        next(answers)
    answers.close()  # type: ignore[attr-defined]
    assert read <= 5 + 3 + 1


def test_a_piece_of_one_token_has_no_rows(calm: Served) -> None:
    [(key, ids, values)] = calm.endpoint().score([("one", [3])])
    assert key == "one"
    assert ids.shape[0] == values.shape[0] == 0


@pytest.mark.parametrize("dialect", SCORING)
def test_503s_dropped_connections_and_half_answers_change_nothing(folder: Path, truth: Any, dialect: str) -> None:
    server = Served(folder, "--fail-every", "3")
    pieces = some_pieces(12, longest=8)
    try:
        check_against(truth, pieces, scored(server.endpoint(dialect, retries=40), pieces), 7)
        assert server.count("posts") > len(pieces)
    finally:
        server.kill()


def test_a_server_killed_half_way_and_started_again_loses_nothing(folder: Path, truth: Any) -> None:
    server = Served(folder)
    pieces = some_pieces(40)
    again = threading.Thread(target=lambda: (time.sleep(0.5), server.start()))
    got: Scored = {}
    try:
        for key, ids, values in server.endpoint(retries=300).score(pieces.items()):
            got[key] = (ids, values)
            if len(got) == 10:
                server.kill()
                again.start()
        check_against(truth, pieces, got, 7)
    finally:
        again.join()
        server.kill()


@pytest.mark.parametrize("dialect", ["vllm", "llama.cpp"])
def test_a_server_that_stays_down_ends_in_a_refusal_after_what_came_before(
    folder: Path, truth: Any, dialect: str
) -> None:
    server = Served(folder, "--die-after", "60", dialect=dialect)
    pieces = some_pieces(80, longest=12)
    got: Scored = {}

    def run() -> None:
        for key, ids, values in server.endpoint(retries=2).score(pieces.items()):
            got[key] = (ids, values)

    with pytest.raises(Refusal, match="run the same command again to go on") as refused:
        run()
    server.kill()
    assert "\n" not in str(refused.value)
    assert f"the {len(got)} answers before it are kept" in str(refused.value)
    assert 0 < len(got) < 60
    check_against(truth, {key: pieces[key] for key in got}, got, 7)


def test_a_server_that_was_never_there_is_refused_in_one_line() -> None:
    endpoint = Endpoint(f"http://127.0.0.1:{free_port()}/v1", retries=1)
    with pytest.raises(Refusal, match="no usable answer in 2 tries") as refused:
        list(endpoint.score([(0, [1, 2])]))
    assert "kept" not in str(refused.value)
    with pytest.raises(Refusal, match=r"teacher\.endpoint\.url=http://127"):
        endpoint.ask()


@pytest.mark.parametrize(("dialect", "limit"), [("vllm", 60), ("openai", 60), ("strings", 5)])
def test_a_k_that_the_server_refuses_names_the_one_it_takes(dialect: str, limit: int, calm: Served) -> None:
    said = rf"^teacher.endpoint.top_k=61: .*set teacher.endpoint.top_k={limit}, or .*--max-logprobs 61$"
    with pytest.raises(Refusal, match=said):
        list(calm.endpoint(dialect, top_k=61).score([(0, [1, 2, 3])]))


def test_servers_that_cannot_score_are_refused_with_the_reason(calm: Served) -> None:
    pieces = some_pieces(2)
    with pytest.raises(Refusal, match="text-generation-inference gives only"):
        scored(calm.endpoint("tgi"), pieces)
    with pytest.raises(Refusal, match="names tokens by their text"):
        scored(calm.endpoint("strings", top_k=5), pieces)
    with pytest.raises(Refusal, match="404: Not Found"):
        scored(calm.endpoint("vllm", dialect="llama.cpp"), pieces)


def test_a_nan_is_refused(calm: Served) -> None:
    with pytest.raises(Refusal, match="it gave nan for a log-probability"):
        scored(calm.endpoint("broken"), {0: [1, 2, 3]})


def test_an_impossible_token_leaves_its_place_empty() -> None:
    rows = [{4: -0.5, 9: -9999.0, 2: -1.0}, {4: -2.0, 9: -1.0, 2: -0.1, 7: -3.0}]
    ids, values = models.teachers.endpoint._best(rows, 5, "http://x")
    assert ids.tolist() == [[4, 2, -1], [2, 9, 4]]
    assert values.tolist() == [[-0.5, -1.0, -np.inf], [np.float32(-0.1), -1.0, -2.0]]


@pytest.mark.parametrize(
    ("told", "seconds"),
    [
        ({}, 0),
        ({"Retry-After": "7"}, 7),
        ({"Retry-After": "soon"}, 0),
        ({"Retry-After": "nan"}, 0),
        ({"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0),
        ({"Retry-After": "Wed, 21 Oct 2099 07:28:00 GMT"}, 600),
    ],
)
def test_a_server_may_ask_for_a_pause_of_up_to_ten_minutes(told: dict[str, str], seconds: float) -> None:
    assert models.teachers.connection._retry_after(httpx.Response(503, headers=told)) == seconds


def test_an_id_beyond_the_vocabulary_is_refused_in_the_servers_words(calm: Served) -> None:
    with pytest.raises(Refusal, match="400: Token id 99 is out of vocabulary"):
        list(calm.endpoint().score([(0, [1, 99])]))


def test_a_key_is_read_from_the_environment_and_never_said(calm: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "wrong")
    with pytest.raises(Refusal, match="401: Unauthorized; set the environment variable MY_KEY") as refused:
        list(calm.endpoint(api_key_variable="MY_KEY").score([(0, [1, 2])]))
    assert "wrong" not in str(refused.value)


@pytest.mark.parametrize("dialect", ["vllm", "llama.cpp", "openai"])
def test_generation_is_the_models_own(dialect: str, calm: Served, truth: Any) -> None:
    prompts = some_pieces(5)
    got = dict(calm.endpoint(dialect).generate(prompts.items(), max_new_tokens=4, temperature=0.0))
    assert got.keys() == prompts.keys()
    for key, prompt in prompts.items():
        ids: list[int] = []
        for _ in range(4):
            ids.append(int(truth(prompt + ids)[-1].argmax()))
        text = "".join(f"<{token}>" for token in ids)
        assert got[key] == Generation(text, None if dialect == "openai" else ids, "length")
        [(_, stopped)] = calm.endpoint(dialect).generate(
            [(0, prompt)], max_new_tokens=4, temperature=0.0, stop=[f"<{ids[1]}>"]
        )
        assert stopped.finish_reason == "stop"
        assert stopped.text == text[: text.index(f"<{ids[1]}>")]


def test_text_prompts_go_where_ids_do_not(calm: Served) -> None:
    with pytest.raises(Refusal, match=r"422: .*takes text prompts"):
        list(calm.endpoint("tgi").generate([(0, [1, 2])], max_new_tokens=2, temperature=0.0))
    [(_, got)] = calm.endpoint("tgi").generate([(0, "<1><2>")], max_new_tokens=2, temperature=0.0)
    [(_, same)] = calm.endpoint("vllm").generate([(0, [1, 2])], max_new_tokens=2, temperature=0.0)
    assert got.text == same.text


def test_a_problem_of_the_pieces_themselves_is_not_swallowed(calm: Served) -> None:
    def broken() -> Iterator[tuple[int, list[int]]]:
        yield 0, [1, 2]
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        list(calm.endpoint().score(broken()))


GOOD = Endpoint("http://host:8000/v1")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"url": "host:8000/v1"}, "teacher.endpoint.url=host:8000/v1: need a url"),
        ({"url": "http://"}, "need a url"),
        ({"url": "http://me:secret@host/v1"}, "holds a user, a password"),
        ({"dialect": "vLLM"}, "teacher.endpoint.dialect=vLLM: need one of"),
        ({"top_k": 0}, "teacher.endpoint.top_k=0: need 1"),
        ({"concurrency": 0}, "teacher.endpoint.concurrency=0"),
        ({"answer_mb": 0}, "teacher.endpoint.answer_mb=0: need 1"),
        ({"retries": -1}, "teacher.endpoint.retries=-1"),
        ({"timeout_seconds": float("nan")}, "teacher.endpoint.timeout_seconds=nan"),
        ({"api_key_variable": "sk-123"}, "need the name of an environment variable"),
    ],
)
def test_values_that_cannot_work_are_refused_without_a_network(values: dict[str, Any], message: str) -> None:
    GOOD.check()
    with pytest.raises(Refusal, match=message) as refused:
        replace(GOOD, **values).check()
    assert "secret" not in str(refused.value)
    assert "sk-123" not in str(refused.value)


# --- real servers, where they are installed ---

LLAMA_CPP = """
import sys, time, xllamacpp
p = xllamacpp.CommonParams()
p.model.path, p.port, p.hostnames = sys.argv[1], int(sys.argv[2]), ["127.0.0.1"]
p.n_ctx, p.n_parallel, p.cpuparams.n_threads, p.n_gpu_layers, p.warmup = 512, 4, 1, 0, False
p.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED  # it computes in half precision
p.cache_type_k = p.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
server = xllamacpp.Server(p)
time.sleep(600)
"""


def write_gguf(folder: Path, path: Path) -> None:
    """The Llama of `folder` with a vocabulary of bytes; those that begin a character are among them."""
    gguf = pytest.importorskip("gguf")
    model = LlamaForCausalLM.from_pretrained(folder)
    config, weights = model.config, {name: value.numpy() for name, value in model.state_dict().items()}
    heads, key_heads = config.num_attention_heads, config.num_key_value_heads
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(key_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(V)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    tokens = ["<unk>", "<s>", "</s>", "▁a"] + [f"<0x{byte:02X}>" for byte in range(200, 256)]
    writer.add_token_list([token.encode() for token in tokens])
    writer.add_token_scores([0.0] * V)
    writer.add_token_types([2, 3, 3, 1] + [6] * 56)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(True)  # which must not be added to ids

    def turned(weight: np.ndarray, count: int) -> np.ndarray:  # GGUF's order of rotary halves
        shape = (count, 2, len(weight) // count // 2, *weight.shape[1:])
        return np.ascontiguousarray(weight.reshape(shape).swapaxes(1, 2).reshape(weight.shape))

    writer.add_tensor("token_embd.weight", weights["model.embed_tokens.weight"])
    writer.add_tensor("output_norm.weight", weights["model.norm.weight"])
    writer.add_tensor("output.weight", weights["lm_head.weight"])
    for layer in range(config.num_hidden_layers):
        for theirs, ours in {
            "attn_norm": "input_layernorm",
            "ffn_norm": "post_attention_layernorm",
            "attn_q": "self_attn.q_proj",
            "attn_k": "self_attn.k_proj",
            "attn_v": "self_attn.v_proj",
            "attn_output": "self_attn.o_proj",
            "ffn_gate": "mlp.gate_proj",
            "ffn_up": "mlp.up_proj",
            "ffn_down": "mlp.down_proj",
        }.items():
            weight = weights[f"model.layers.{layer}.{ours}.weight"]
            if theirs in ("attn_q", "attn_k"):
                weight = turned(weight, heads if theirs == "attn_q" else key_heads)
            writer.add_tensor(f"blk.{layer}.{theirs}.weight", weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_llama_cpps_own_server(folder: Path, truth: Any, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    write_gguf(folder, tmp_path / "tiny.gguf")
    port = free_port()
    with (tmp_path / "log").open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "-c", LLAMA_CPP, str(tmp_path / "tiny.gguf"), str(port)], stdout=out, stderr=out
        )
    endpoint = Endpoint(f"http://127.0.0.1:{port}/v1", top_k=V, concurrency=4, retries=60)
    try:
        assert endpoint.ask().kind == "llama.cpp"
        pieces = some_pieces(12)
        for k in (7, V):
            got = scored(replace(endpoint, top_k=k), pieces)
            for key, (ids, values) in got.items():
                expected = truth(pieces[key])[:-1]
                assert values.shape == (len(pieces[key]) - 1, k)
                np.testing.assert_allclose(values, expected.topk(k).values, atol=2e-5, rtol=0)
                np.testing.assert_allclose(values, expected.gather(1, torch.from_numpy(ids)), atol=2e-5, rtol=0)
        [(_, told)] = endpoint.generate([(0, [1, 5, 6])], max_new_tokens=3, temperature=0.0)
        assert told.ids is not None
        assert told.ids[0] == int(truth([1, 5, 6])[-1].argmax())
    finally:
        process.kill()
        process.wait()


def test_transformers_own_server(folder: Path, truth: Any, tmp_path: Path) -> None:
    for needed in ("fastapi", "uvicorn", "openai"):
        pytest.importorskip(needed)
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({f"w{token}": token for token in range(V)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    LlamaForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "model")
    PreTrainedTokenizerFast(tokenizer_object=words, bos_token="w1", eos_token="w2").save_pretrained(tmp_path / "model")
    port = free_port()
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(tmp_path / "model")]
    with (tmp_path / "log").open("w") as out:
        process = subprocess.Popen([*command, "--port", str(port), "--device", "cpu"], stdout=out, stderr=out)
    endpoint = Endpoint(
        f"http://127.0.0.1:{port}/v1", model=str(tmp_path / "model"), dialect="openai", top_k=5, retries=200
    )
    try:
        [(_, told)] = endpoint.generate([(0, "w1 w5 w6")], max_new_tokens=1, temperature=0.0)
        assert told.text.split() == [f"w{int(truth([1, 5, 6])[-1].argmax())}"]
        with pytest.raises(Refusal, match="it cannot score given token ids"):
            list(endpoint.score([(0, [1, 5, 6])]))
    finally:
        process.kill()
        process.wait()
