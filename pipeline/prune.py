"""Cut a model: score its units, plan what goes, cut, and show that the cut model is the masked one."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from models.errors import Refusal
from models.load import DTYPES, check_folder, empty_model, load_config, load_model, parameter_count, save_model
from models.pruning import importance as scoring
from models.pruning.groups import Anatomy, anatomy_of
from models.pruning.importance import Importance
from models.pruning.plan import Scores, Shapes, Size, Wish, alike, choose
from models.pruning.surgery import Kept, cut_state, masked_state, silent_experts, smaller_config
from pipeline import artifact
from pipeline.context import Context
from pipeline.data import packing
from pipeline.data.batch import collate, pad_token
from pipeline.data.rows import RowSource, check_source, rows_of, source_key
from pipeline.data.tokenizer import load_tokenizer

_AT_ONCE = 16  # calibration rows in a batch
_PROOF_ROWS = 4


@dataclass(frozen=True)
class Prune:
    """Remove the least important units of a model, in widths that its family's config can say."""

    model: str  # folder or hub id
    data: RowSource  # of whose training split some rows are the calibration
    importance: Importance
    kinds: Sequence[str] = ("heads", "mlp")
    kept_fraction: float | None = 0.8
    target_parameters: int | None = None
    target_bytes: int | None = None
    ranking: str = "layer"
    per: str = "parameter"
    protect_first: int = 0
    protect_last: int = 0
    multiple_of: int = 1
    plan: str | None = None  # a plan.json, as it was written or edited: nothing is scored
    calibration_rows: int = 10
    calibration_tokens: int = 64  # of each row
    tolerance: float = 1e-4  # of the certificate, as a share of the largest logit
    dtype: str = "float32"
    trust_remote_code: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("calibration_rows", 1), ("calibration_tokens", 2)):
            if getattr(self, name) < least:
                raise Refusal(f"prune.{name}={getattr(self, name)}: need at least {least}")
        if self.dtype not in DTYPES:
            raise Refusal(f"prune.dtype={self.dtype}: need one of {', '.join(DTYPES)}")
        if not self.tolerance > 0:
            raise Refusal(f"prune.tolerance={self.tolerance}: need a number above 0")

    @property
    def _wish(self) -> Wish:
        return Wish(
            tuple(self.kinds),
            self.kept_fraction,
            self.target_parameters,
            self.target_bytes,
            self.ranking,
            self.per,
            self.protect_first,
            self.protect_last,
            self.multiple_of,
        )

    def ranks(self, context: Context) -> int:
        return 1

    def parents(self, context: Context) -> dict[str, str]:
        given = {"model": self.model, "plan": self.plan, **self.data.made_by_stages}
        return {role: path for role, path in given.items() if path}

    def content(self) -> str:
        """Hash of the text it reads."""
        return source_key(self.data)

    def check(self, context: Context) -> dict[str, Any]:
        corpus = check_source(context, self.data)
        if not context.produced_by(self.model):
            check_folder(self.model, "model")
        elif context.config_folder(self.model) == self.model and not context.finished(self.model):
            raise Refusal(
                f"{context.stage} needs the stage {Path(self.model).name}, which has not been run; add it to stages, "
                f"or give stages.{context.stage}.model=FOLDER"
            )
        config = load_config(context.config_folder(self.model), "model", self.trust_remote_code)
        whole = empty_model(config)
        anatomy = anatomy_of(whole)
        shapes = Shapes.of_model(whole, anatomy)
        if self.plan is not None:
            kept, _ = read_plan(Path(self.plan), anatomy)
        else:
            scoring.check(self.importance, self.kinds)
            # As if all scores were known: what cannot be met or said is refused before a weight is read.
            scores = {group.name: np.arange(group.units, dtype=float) for group in anatomy.groups.values()}
            kept = alike(shapes, scores, choose(shapes, scores, self._wish), self._wish)
        smaller, note = smaller_config(config, anatomy, kept)
        context.plan_model(smaller)
        return {
            "model": smaller.model_type,
            "parameters": parameter_count(empty_model(smaller)),
            "data": corpus,
            "length": "a plan" if self.plan else f"{self.calibration_rows} rows of calibration",
            "teacher": f"{self.model} ({parameter_count(whole):,})",
            "warnings": [note] if note else [],
            "commits": {"model": getattr(config, "_commit_hash", None)},
        }

    def prepare(self, context: Context) -> None:
        """Nothing to share: one process does it all."""
        context.work.mkdir(parents=True, exist_ok=True)

    def run(self, context: Context) -> None:
        begin = time.monotonic()
        tokenizer = load_tokenizer(self.model, self.trust_remote_code)
        if self.data.chat_template is not None:
            tokenizer.chat_template = packing.chat_template(tokenizer, self.data)
        model = load_model(
            self.model, dtype=DTYPES[self.dtype], role="model", trust_remote_code=self.trust_remote_code
        ).to(context.device)
        anatomy = anatomy_of(model)
        shapes = Shapes.of_model(model, anatomy)
        scores: Scores = {}
        if self.plan is not None:
            kept, note = read_plan(Path(self.plan), anatomy)
        else:
            batches = self._batches(context, tokenizer, "train", self.calibration_rows)
            scores = self.importance.scores(model, anatomy, self.kinds, batches)
            wanted = choose(shapes, scores, self._wish)
            kept = alike(shapes, scores, wanted, self._wish)
            note = _apart(shapes, wanted, kept)
        config, said = smaller_config(model.config, anatomy, kept)
        sizes = shapes.size({}), shapes.size(kept)
        plan = _plan(context, anatomy, kept, scores, sizes, config, [each for each in (note, said) if each])
        manifest = context.manifest("model")

        def build(folder: Path) -> None:
            with torch.device("meta"):
                cut = AutoModelForCausalLM.from_config(config)
            cut.generation_config = model.generation_config
            state = cut_state(model.state_dict(), anatomy, kept)
            save_model(cut, tokenizer, folder, state, DTYPES[self.dtype])
            _write_plan(folder / artifact.PLAN, plan)
            del cut, state
            proof = self._proof(context, tokenizer, model, anatomy, kept, folder)
            manifest["certificates"] = {"masked_equals_cut": proof}
            manifest["metrics"] = {
                "parameters": sizes[1].parameters,
                **{f"{name}_before": value for name, value in vars(sizes[0]).items()},
                **{f"{name}_after": value for name, value in vars(sizes[1]).items()},
                "notes": plan["notes"],
            }
            manifest["seconds"] = round(time.monotonic() - begin, 3)

        artifact.publish(context.out, build, manifest)
        for line in plan["notes"]:
            print(f"{context.stage}: {line}")
        print(
            f"{context.stage}: {sizes[0].parameters:,} → {sizes[1].parameters:,} parameters, "
            f"{sizes[0].kv_bytes:,} → {sizes[1].kv_bytes:,} cache bytes a token; masked = cut within "
            f"{manifest['certificates']['masked_equals_cut']['max_difference']:.1e}"
        )

    def _batches(self, context: Context, tokenizer: Any, split: str, count: int) -> list[dict[str, Tensor]]:
        """Some rows of a split, of `calibration_tokens` each; the same ones for the same seed."""
        rows, _, _ = rows_of(self.data, split, tokenizer, context.data_folder)
        if not len(rows):
            return []
        chosen = np.random.default_rng([self.seed, *split.encode()]).permutation(len(rows))[:count]
        names = ("input_ids", "position_ids", "targets")
        short = [{name: rows[int(n)][name][: self.calibration_tokens] for name in names} for n in chosen]
        batches = []
        for first in range(0, len(short), _AT_ONCE):
            batch = collate(short[first : first + _AT_ONCE], pad_token=pad_token(tokenizer))
            batches.append({name: tensor.to(context.device) for name, tensor in batch.items()})
        return batches

    @torch.no_grad()
    def _proof(
        self, context: Context, tokenizer: Any, model: Any, anatomy: Anatomy, kept: Kept, folder: Path
    ) -> dict[str, Any]:
        """The masked model's logits against those of the folder that was written, on text. `model` becomes masked."""
        batches = self._batches(context, tokenizer, "validation", _PROOF_ROWS)
        batches = batches or self._batches(context, tokenizer, "train", _PROOF_ROWS)
        model.load_state_dict(masked_state(model.state_dict(), anatomy, kept))
        cut = load_model(str(folder), dtype=DTYPES[self.dtype], role="pruned").to(context.device)
        model.eval(), cut.eval()
        apart, largest, tokens = 0.0, 0.0, 0
        for batch in batches:
            words = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"], "use_cache": False}
            with silent_experts(model, anatomy, kept):
                masked = model(**words).logits.float()
            real = batch["targets"] >= 0
            apart = max(apart, float((masked - cut(**words).logits.float())[real].abs().max()))
            largest, tokens = max(largest, float(masked[real].abs().max())), tokens + int(real.sum())
        allowed = self.tolerance * max(largest, 1e-9)
        if not apart <= allowed:
            raise Refusal(
                f"{context.stage}: the cut model's logits differ by {apart:.1e} from the masked one's, and "
                f"{allowed:.1e} is allowed (stages.{context.stage}.tolerance={self.tolerance:g} of the largest); "
                f"nothing was written. A low dtype needs a larger tolerance; in float32 this family is not understood"
            )
        return {"max_difference": apart, "largest_logit": largest, "tolerance": allowed, "tokens": tokens}


def read_plan(path: Path, anatomy: Anatomy) -> tuple[dict[str, np.ndarray], str]:
    """Kept units of a plan.json, and its first note. Raises Refusal for what this model does not have."""
    try:
        plan = json.loads(path.read_text())
        named = {name: [int(unit) for unit in units] for name, units in plan["kept"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as problem:
        raise Refusal(f"prune.plan={path}: no plan: {type(problem).__name__} {problem}; need a plan.json") from None
    kept = {}
    for name, units in named.items():
        group = anatomy.groups.get(name)
        if group is None:
            raise Refusal(f"prune.plan={path}: this model has no group {name}")
        if not units or sorted(set(units)) != units or units[0] < 0 or units[-1] >= group.units:
            raise Refusal(
                f"prune.plan={path}: {name} keeps {str(units)[:60]}; need rising numbers from 0 to {group.units - 1}"
            )
        kept[name] = np.array(units)
    return kept, "as the plan says"


def _write_plan(path: Path, plan: dict[str, Any]) -> None:
    """JSON with each group's units on one line: there can be ten thousand."""
    lines = []
    for name, value in plan.items():
        if name in ("kept", "scores"):
            inner = ",\n".join(f"    {json.dumps(key)}: {json.dumps(units)}" for key, units in value.items())
            lines.append(f"  {json.dumps(name)}: {{\n{inner}\n  }}")
        else:
            lines.append(f"  {json.dumps(name)}: {json.dumps(value)}")
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def _apart(shapes: Shapes, wanted: Kept, kept: Kept) -> str:
    """What was given up for one width in all layers."""
    names = {name for name in {*wanted, *kept} if len(wanted.get(name, ())) != len(kept.get(name, ()))}
    if not names:
        return ""
    sizes = shapes.size(wanted).parameters, shapes.size(kept).parameters
    return (
        f"the scores ask for other widths in other layers ({sizes[0]:,} parameters); a config has one for all: the "
        f"nearest such plan has {sizes[1]:,}"
    )


def _plan(
    context: Context,
    anatomy: Anatomy,
    kept: Kept,
    scores: Scores,
    sizes: tuple[Size, Size],
    config: Any,
    notes: list[str],
) -> dict[str, Any]:
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return {
        "model": context.parents.get("model"),
        "kept": {name: units.tolist() for name, units in sorted(kept.items())},
        "units": {name: anatomy.groups[name].units for name in sorted(kept)},
        "before": vars(sizes[0]),
        "after": vars(sizes[1]),
        "notes": notes,
        "loads_in": {
            "transformers": f"AutoModelForCausalLM, as {config.model_type}",
            "vllm": f"tensor parallel sizes that divide {heads} heads, e.g. {_divisors(heads)}; {kv_heads} KV heads",
            "llama.cpp": "K-quants need rows of a multiple of 256, Q4_0 and Q8_0 of 32",
        },
        "config": {k: v for k, v in config.to_dict().items() if k != "transformers_version"},
        "scores": {name: [float(f"{value:.6g}") for value in each] for name, each in sorted(scores.items())},
    }


def _divisors(heads: int) -> str:
    return ", ".join(str(n) for n in (1, 2, 4, 8, 16) if heads % n == 0)
