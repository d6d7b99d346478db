"""Prune a model: score its units, plan, remove units, and prove that the result equals the masked model."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from models.errors import Problems, Refusal
from models.load import DTYPES, empty_model, load_config, load_model, parameter_count
from models.pruning import importance as scoring
from models.pruning.feasible import feasible
from models.pruning.files import plan_of, read_plan, write_plan
from models.pruning.groups import Anatomy, anatomy_of
from models.pruning.importance import Importance, Statistics
from models.pruning.plan import Scores, Wish, choose
from models.pruning.proof import masked_equals_pruned
from models.pruning.sizes import Shapes
from models.pruning.surgery import Kept, pruned_state, silence, smaller_config
from models.save import save_model
from models.sharding import engine_of, load_sharded, zero3
from pipeline import artifact
from pipeline.context import Context
from pipeline.data.calibration import Calibration
from pipeline.data.rendering import tokenizer_of
from pipeline.data.source import DataSource, check_source, source_key
from pipeline.forecast.workload import Reads
from pipeline.planned import architecture_of, config_to_change, multiple_for_later_stages
from pipeline.stages.stage import Makes, Stage
from pipeline.stages.stage import Plan as StagePlan
from pipeline.steps.scoring import CalibrationText, Scoring, prepare_text
from pipeline.training.ranks import join, leave, watch
from pipeline.training.strategy import prepare_environment

_KEPT_FRACTION = 0.8  # where no budget is given
_PROOF_SAMPLES = 4


@dataclass(frozen=True)
class Prune(Stage):
    """Remove the least important units of a model, in widths that its family's config can express."""

    makes: ClassVar[Makes] = "model"

    model: str  # folder or hub id
    data: DataSource  # some sequences of its training split are the calibration text
    importance: Importance
    calibration: Calibration
    kinds: Sequence[str] = ("heads", "mlp")
    kept_fraction: float | None = None  # null: 0.8, where no target is given
    target_parameters: int | None = None
    target_bytes: int | None = None
    ranking: str = "layer"
    per: str = "parameter"
    protect_first: int = 0
    protect_last: int = 0
    multiple_of: int | str = 1  # auto: what the schemes and the formats of later stages need
    plan: str | None = None  # a plan.json, as it was written or edited: nothing is scored
    scores: Sequence[str] | None = None  # scores.safetensors of earlier runs, added up: no text is read for them
    steps: int = 1  # of equal size; units are scored anew before each
    tolerance: float = 1e-4  # of the certificate, as a share of the largest logit
    dtype: str = "float32"
    trust_remote_code: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise Refusal(f"prune.steps={self.steps}: need at least 1")
        if self.dtype not in DTYPES:
            raise Refusal(f"prune.dtype={self.dtype}: need one of {', '.join(DTYPES)}")
        if not self.tolerance > 0:
            raise Refusal(f"prune.tolerance={self.tolerance}: need a number above 0")
        for name, value in (("kinds", self.kinds), ("scores", self.scores)):
            if isinstance(value, str):
                raise Refusal(f"prune.{name}={value}: need a list, e.g. prune.{name}=[{value}]")
        if self.scores is not None and self.plan is not None:
            raise Refusal("prune.scores with a plan: nothing is scored for a plan; leave one of them null")
        if self.scores is not None and self.steps > 1:
            raise Refusal(f"prune.scores with steps={self.steps}: they are of the whole model; use steps=1")
        if isinstance(self.multiple_of, str) and self.multiple_of != "auto":
            raise Refusal(f"prune.multiple_of={self.multiple_of}: need a whole number, or auto")
        if self.scores == []:
            raise Refusal(f"prune.scores=[]: name some {artifact.SCORES}, or null")

    def _wish(self, context: Context) -> Wish:
        without_budget = self.kept_fraction is self.target_parameters is self.target_bytes is None
        return Wish(
            tuple(self.kinds),
            _KEPT_FRACTION if without_budget else self.kept_fraction,
            self.target_parameters,
            self.target_bytes,
            self.ranking,
            self.per,
            self.protect_first,
            self.protect_last,
            self._multiple(context),
        )

    @property
    def _automatic(self) -> bool:
        return self.multiple_of == "auto"

    def _multiple(self, context: Context) -> int:
        return multiple_for_later_stages(context) if self._automatic else self.multiple_of  # type: ignore[return-value]

    @property
    def _files(self) -> list[Path]:
        """Where a folder is given, the scores in it."""
        return [Path(path) / artifact.SCORES if Path(path).is_dir() else Path(path) for path in self.scores or []]

    @property
    def _reads(self) -> bool:
        """Whether calibration text is read."""
        return self.plan is None and self.scores is None and self.importance.needs_calibration_data

    def ranks(self, context: Context) -> int:
        return context.world if self._reads else 1

    def parents(self, context: Context) -> dict[str, str]:
        given = {"model": self.model, "plan": self.plan, **self.data.made_by_stages}
        given |= {f"scores {number}": str(path) for number, path in enumerate(self._files)}
        return {role: path for role, path in given.items() if path}

    def content(self) -> str:
        """Hash of the text it reads."""
        return source_key(self.data)

    def check(self, context: Context) -> StagePlan:
        corpus = check_source(context, self.data)
        config = config_to_change(context, self.model, self.trust_remote_code)
        whole = empty_model(config)
        anatomy = anatomy_of(whole)
        shapes = Shapes.of_model(whole, anatomy)
        kept: Kept
        if self.plan is not None:
            if Path(self.plan).resolve().is_relative_to(context.out.resolve()):
                raise Refusal(f"prune.plan={self.plan}: the stage writes that file itself; copy it elsewhere first")
            kept, _ = read_plan(Path(self.plan), anatomy)
        else:
            kept = self._kept(context, config, corpus, shapes)
        smaller, note = smaller_config(config, anatomy, kept)
        context.plan_model(smaller)
        return StagePlan(
            model=smaller.model_type,
            parameters=parameter_count(empty_model(smaller)),
            data=corpus,
            until="a plan" if self.plan else str(self.calibration),
            teacher=f"{self.model} ({parameter_count(whole):,})",
            warnings=[note] if note else [],
            # What `auto` comes to depends on other stages' settings: where they have changed, the model is pruned anew.
            content=f"{self.content()} in multiples of {self._multiple(context)}" if self._automatic else None,
            commits={"model": getattr(config, "_commit_hash", None)},
        )

    def workload(self, context: Context) -> Reads | None:
        setting = context.setting(context.stage, "model")
        trusted = self.trust_remote_code
        config = architecture_of(context, self.model, "model", setting=setting, trust_remote_code=trusted)
        whole = empty_model(config)
        anatomy = anatomy_of(whole)
        shapes = Shapes.of_model(whole, anatomy)
        kept = (
            self._as_if_scored(context, config, shapes) if self.plan is None else read_plan(Path(self.plan), anatomy)[0]
        )
        context.plan_model(smaller_config(config, anatomy, kept)[0])
        if not self._reads:
            return None
        gradients = getattr(self.importance, "needs_gradients", False)
        sharded = context.strategy.shards_parameters
        return Reads.of(config, self.dtype, self.calibration, backward=gradients, sharded=sharded, times=self.steps)

    def _as_if_scored(self, context: Context, config: Any, shapes: Shapes) -> Kept:
        """What is kept where every group's units are worth as much as another's."""
        scores = {group.name: np.arange(group.units, dtype=float) for group in shapes.anatomy.groups.values()}
        choose(shapes, scores, self._wish(context))
        kept, _ = feasible(config, shapes, scores, replace(self._wish(context), ranking="layer"))
        return kept

    def _kept(self, context: Context, config: Any, corpus: dict[str, Any], shapes: Shapes) -> Kept:
        """In the check, as if all scores were known: what cannot be met or expressed is refused before a weight is
        read. How units of several groups compare is not known, so that later stages are checked with every group's own
        share."""
        problems = Problems()
        kept: Kept = {}
        with problems:
            self.calibration.check(context.stage, config, corpus, self.data.max_length)
        with problems:
            scoring.check(self.importance, shapes.anatomy, self.kinds)
            self._scoring(context).check(self._files)
        with problems:
            kept = self._as_if_scored(context, config, shapes)
        if problems.lines and not self._automatic:  # later stages tell what they refuse of the whole model
            context.plan_model(config)
        problems.tell()
        return kept

    def prepare(self, context: Context) -> None:
        """The calibration text, before the ranks start."""
        prepare_text(context, self.data, self._tokenizer())

    def run(self, context: Context) -> None:
        begin = time.monotonic()
        tokenizer, place = self._tokenizer(), torch.device(context.device)
        several = self.ranks(context) > 1
        if several:
            prepare_environment(context.device)
            place = join(context)
        config = load_config(self.model, "model", self.trust_remote_code)
        whole = empty_model(config)
        anatomy = anatomy_of(whole)
        shapes = Shapes.of_model(whole, anatomy)
        if self.plan is not None:
            decision = _Decision(*read_plan(Path(self.plan), anatomy, context.parents["model"]["content_hash"]))
        else:
            decision = self._decide(context, tokenizer, config, shapes, place)
        if several:
            leave(context)
        if context.rank:
            return
        sharded = several and context.strategy.shards_parameters  # then it fits no one device
        model = decision.model or load_model(self.model, **self._words).to("cpu" if sharded else place)
        self._publish(context, tokenizer, model, config, shapes, decision, begin)

    def _publish(
        self,
        context: Context,
        tokenizer: Any,
        model: Any,
        config: Any,
        shapes: Shapes,
        decision: _Decision,
        begin: float,
    ) -> None:
        anatomy, kept = shapes.anatomy, decision.kept
        smaller, note = smaller_config(config, anatomy, kept)
        sizes = shapes.size({}), shapes.size(kept)
        notes = [each for each in (decision.note, note) if each]
        plan = plan_of(context.parents.get("model"), anatomy, kept, decision.scores, sizes, smaller, notes)
        manifest = context.manifest(self.makes)

        def build(folder: Path) -> None:
            with torch.device("meta"):
                pruned = AutoModelForCausalLM.from_config(smaller)
            pruned.generation_config = model.generation_config
            state = pruned_state(model.state_dict(), anatomy, kept)
            save_model(pruned, tokenizer, folder, state, DTYPES[self.dtype])
            write_plan(folder / artifact.PLAN, plan)
            if decision.statistics:
                self._scoring(context).write(decision.statistics, folder / artifact.SCORES)
            del pruned, state
            proof = self._proof(context, tokenizer, model, anatomy, kept, folder)
            manifest["certificates"] = {"masked_equals_pruned": proof}
            manifest["metrics"] = {
                "parameters": sizes[1].parameters,
                **{f"{name}_before": value for name, value in vars(sizes[0]).items()},
                **{f"{name}_after": value for name, value in vars(sizes[1]).items()},
                "notes": notes,
            }
            manifest["seconds"] = round(time.monotonic() - begin, 3)

        artifact.publish(context.out, build, manifest)
        for line in notes:
            print(f"{context.stage}: {line}")
        print(
            f"{context.stage}: {sizes[0].parameters:,} → {sizes[1].parameters:,} parameters, "
            f"{sizes[0].kv_bytes:,} → {sizes[1].kv_bytes:,} cache bytes a token in 16 bits; masked = pruned within "
            f"{manifest['certificates']['masked_equals_pruned']['max_difference']:.1e}"
        )

    def _tokenizer(self) -> Any:
        return tokenizer_of(self.model, self.data, self.trust_remote_code)

    def _scoring(self, context: Context) -> Scoring:
        return Scoring(context, self.importance, self.kinds)

    @property
    def _words(self) -> dict[str, Any]:
        return {"dtype": DTYPES[self.dtype], "role": "model", "trust_remote_code": self.trust_remote_code}

    def _decide(self, context: Context, tokenizer: Any, config: Any, shapes: Shapes, place: torch.device) -> _Decision:
        """From the scores, worked out anew before each step; on every rank."""
        anatomy = shapes.anatomy
        model, close = self._open(context, place)
        watch(context, model)
        kept: dict[str, np.ndarray] = {}
        for step in range(1, self.steps + 1):
            statistics = self._statistics(context, tokenizer, model, anatomy, kept, step)
            scores = self.importance.scores(model, anatomy, self.kinds, statistics)
            for name, units in kept.items():  # what an earlier step removed is below all that is there
                scores[name] = np.where(np.isin(np.arange(len(scores[name])), units), scores[name], -1.0)
            wish = self._wish(context).after(step, self.steps, shapes.size({}).parameters)
            kept, note = feasible(config, shapes, scores, wish)
            if step < self.steps:
                silence(model, anatomy, kept)
        if close is not None:
            close()
        unchanged = model if close is None and self.steps == 1 else None
        return _Decision(kept, note, scores, statistics, unchanged)

    def _open(self, context: Context, place: torch.device) -> tuple[Any, Callable[[], None] | None]:
        """The model to be scored, and how to be rid of it where it is sharded."""
        strategy = context.strategy
        if self.ranks(context) == 1 or not strategy.shards_parameters:
            return load_model(self.model, **self._words).to(place), None
        config = zero3(self.dtype, "cpu" if strategy.offloads_parameters else "none")
        model = load_sharded(self.model, config, **self._words)
        return model, engine_of(model, config).destroy

    def _statistics(
        self, context: Context, tokenizer: Any, model: Any, anatomy: Anatomy, kept: Kept, step: int
    ) -> Statistics:
        """Of the calibration text, or what files hold of them."""
        if self.scores is not None:
            return self._scoring(context).added(self._files)
        if not self.importance.needs_calibration_data:
            return {}
        place = torch.device("cpu")
        if context.device == "cuda":
            place = torch.device("cuda", torch.cuda.current_device())
        text = CalibrationText(context, tokenizer, self.seed)
        batches = text.batches("train", self.calibration, context.rank, self.ranks(context), place)
        return self._scoring(context).gather(model, anatomy, kept, batches, step)

    def _proof(
        self, context: Context, tokenizer: Any, model: Any, anatomy: Anatomy, kept: Kept, folder: Path
    ) -> dict[str, Any]:
        """The masked model against the folder that was written, on text. `model` becomes masked."""
        place = next(model.parameters()).device
        few = replace(self.calibration, samples=_PROOF_SAMPLES, concatenated=False)
        text = CalibrationText(context, tokenizer, self.seed)
        batches = text.batches("validation", few, place=place) or text.batches("train", few, place=place)
        pruned = load_model(str(folder), **{**self._words, "role": "pruned"}).to(place)
        return masked_equals_pruned(model, pruned, anatomy, kept, batches, context.stage, self.tolerance)


@dataclass(frozen=True)
class _Decision:
    """Which units are kept, and from what that follows."""

    kept: Kept
    note: str
    scores: Scores = field(default_factory=dict)
    statistics: Statistics = field(default_factory=dict)
    model: Any = None  # the whole model, where it is still what it was
