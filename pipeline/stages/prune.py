"""Cut a model: score its units, plan what goes, cut, and show that the cut model is the masked one."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from datasets import load_from_disk
from hydra.utils import instantiate
from safetensors.numpy import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from models.errors import Refusal
from models.load import DTYPES, empty_model, load_config, load_model, parameter_count, save_model
from models.pruning import importance as scoring
from models.pruning.files import plan_of, read_partial_scores, read_plan, read_scores, write_partial_scores, write_plan
from models.pruning.groups import Anatomy, anatomy_of
from models.pruning.importance import Importance, Statistics
from models.pruning.plan import Scores, Shapes, Wish, alike, choose
from models.pruning.surgery import Kept, cut_state, expressible, silence, silent_experts, smaller_config
from models.sharding import engine_of, load_sharded, zero3
from models.targets import IGNORED
from pipeline import artifact
from pipeline.context import Context
from pipeline.data.batch import blank, collate, pad_token
from pipeline.data.calibration import Calibration
from pipeline.data.conversations import tokenizer_of
from pipeline.data.prepared import sequences_of
from pipeline.data.source import DataSource, check_source, source_key
from pipeline.planned import config_to_change
from pipeline.progress import shown
from pipeline.stages.stage import Makes, Stage
from pipeline.stages.stage import Plan as StagePlan
from pipeline.training.ranks import join
from pipeline.training.strategy import prepare_environment

_PROOF_SAMPLES = 4


@dataclass(frozen=True)
class Prune(Stage):
    """Remove the least important units of a model, in widths that its family's config can say."""

    makes: ClassVar[Makes] = "model"

    model: str  # folder or hub id
    data: DataSource  # of whose training split some rows are the calibration
    importance: Importance
    calibration: Calibration
    kinds: Sequence[str] = ("heads", "mlp")
    kept_fraction: float | None = 0.8
    target_parameters: int | None = None
    target_bytes: int | None = None
    ranking: str = "layer"
    per: str = "parameter"
    protect_first: int = 0
    protect_last: int = 0
    multiple_of: int | str = 1  # auto: what the scheme and the formats of later stages need
    plan: str | None = None  # a plan.json, as it was written or edited: nothing is scored
    scores: Sequence[str] | None = None  # scores.safetensors of earlier cuts, added up: no text is read for them
    steps: int = 1  # the cut is taken in so many, the units scored anew before each
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
        return Wish(
            tuple(self.kinds),
            self.kept_fraction,
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
        """Where it is `auto`, the least that the schemes and the formats of this run's later stages divide."""
        if not self._automatic:
            return self.multiple_of  # type: ignore[return-value]
        order, stages = context.config["order"], context.config["stages"]
        needed = 1
        for name in order[order.index(context.stage) + 1 :]:
            for node in [
                stages[name].get("scheme"),
                stages[name].get("qat"),
                *(stages[name].get("formats") or {}).values(),
            ]:
                if node is not None:
                    needed = math.lcm(needed, getattr(instantiate(node, _convert_="all"), "multiple", 1))
        return needed

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
        if self.plan is not None:
            if Path(self.plan).resolve().is_relative_to(context.out.resolve()):
                raise Refusal(f"prune.plan={self.plan}: the stage writes that file itself; copy it elsewhere first")
            kept, _ = read_plan(Path(self.plan), anatomy)
        else:
            self.calibration.check("prune", config, corpus, self.data.max_length)
            scoring.check(self.importance, anatomy, self.kinds)
            for path in self._files:
                self._check_scores(path, read_scores(path)[1], self._scored(context))
            # As if all scores were known: what cannot be met or said is refused before a weight is read. How units of
            # several groups compare is not known, so that later stages are checked with every group's own share.
            scores = {group.name: np.arange(group.units, dtype=float) for group in anatomy.groups.values()}
            choose(shapes, scores, self._wish(context))
            kept, _ = self._said(config, shapes, scores, replace(self._wish(context), ranking="layer"))
        smaller, note = smaller_config(config, anatomy, kept)
        context.plan_model(smaller)
        return StagePlan(
            model=smaller.model_type,
            parameters=parameter_count(empty_model(smaller)),
            data=corpus,
            until="a plan" if self.plan else str(self.calibration),
            teacher=f"{self.model} ({parameter_count(whole):,})",
            warnings=[note] if note else [],
            # What `auto` comes to is of other stages' settings: a cut is made anew where they have changed.
            content=f"{self.content()} in multiples of {self._multiple(context)}" if self._automatic else None,
            commits={"model": getattr(config, "_commit_hash", None)},
        )

    def prepare(self, context: Context) -> None:
        """The rows, before the ranks start."""
        context.work.mkdir(parents=True, exist_ok=True)
        tokenizer = self._tokenizer()
        folders = {}
        for split in ("train", "validation"):
            rows, _, folder = sequences_of(self.data, split, tokenizer, context.data_folder)
            folders[split] = str(folder) if len(rows) else None
        if folders["train"] is None:
            raise Refusal(
                f"{context.stage}: no row of data.train is left after tokenizing; there is no calibration text"
            )
        artifact.write_json(context.work / "prepared.json", folders)

    def run(self, context: Context) -> None:
        begin = time.monotonic()
        tokenizer, place = self._tokenizer(), torch.device(context.device)
        several = self.ranks(context) > 1
        if several:
            prepare_environment(context.device)
            place = join(context.device)
        config = load_config(self.model, "model", self.trust_remote_code)
        whole = empty_model(config)
        anatomy = anatomy_of(whole)
        shapes = Shapes.of_model(whole, anatomy)
        model: Any = None
        scores: dict[str, np.ndarray] = {}
        statistics: Statistics = {}
        if self.plan is not None:
            kept, note = read_plan(Path(self.plan), anatomy, context.parents["model"]["content_hash"])
        else:
            model, kept, note, scores, statistics = self._decide(context, tokenizer, shapes, place)
        if several:
            torch.distributed.barrier()
            torch.distributed.destroy_process_group()
        if context.rank:
            return
        sharded = several and context.strategy.shards_parameters  # then it fits no one device
        model = model or load_model(self.model, **self._words).to("cpu" if sharded else place)
        smaller, said = smaller_config(config, anatomy, kept)
        sizes = shapes.size({}), shapes.size(kept)
        plan = plan_of(
            context.parents.get("model"), anatomy, kept, scores, sizes, smaller, [each for each in (note, said) if each]
        )
        manifest = context.manifest(self.makes)

        def build(folder: Path) -> None:
            with torch.device("meta"):
                cut = AutoModelForCausalLM.from_config(smaller)
            cut.generation_config = model.generation_config
            state = cut_state(model.state_dict(), anatomy, kept)
            save_model(cut, tokenizer, folder, state, DTYPES[self.dtype])
            write_plan(folder / artifact.PLAN, plan)
            if statistics:
                save_file(statistics, folder / artifact.SCORES, metadata={"of": json.dumps(self._scored(context))})
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
            f"{sizes[0].kv_bytes:,} → {sizes[1].kv_bytes:,} cache bytes a token in 16 bits; masked = cut within "
            f"{manifest['certificates']['masked_equals_cut']['max_difference']:.1e}"
        )

    def _tokenizer(self) -> Any:
        tokenizer = tokenizer_of(self.model, self.data, self.trust_remote_code)
        return tokenizer

    @property
    def _words(self) -> dict[str, Any]:
        return {"dtype": DTYPES[self.dtype], "role": "model", "trust_remote_code": self.trust_remote_code}

    def _decide(
        self, context: Context, tokenizer: Any, shapes: Shapes, place: torch.device
    ) -> tuple[Any, dict[str, np.ndarray], str, dict[str, np.ndarray], Statistics]:
        """(the model, where it is still what it was; kept units; a note; scores; statistics), on every rank."""
        anatomy = shapes.anatomy
        model, close = self._open(context, place)
        kept: dict[str, np.ndarray] = {}
        for step in range(1, self.steps + 1):
            statistics = self._statistics(context, tokenizer, model, anatomy, kept, step)
            scores = self.importance.scores(model, anatomy, self.kinds, statistics)
            for name, units in kept.items():  # what went in an earlier step is below all that is there
                scores[name] = np.where(np.isin(np.arange(len(scores[name])), units), scores[name], -1.0)
            wish = self._wish(context).after(step, self.steps, shapes.size({}).parameters)
            kept, note = self._said(load_config(self.model, "model", self.trust_remote_code), shapes, scores, wish)
            if step < self.steps:
                silence(model, anatomy, kept)
        if close is not None:
            close()
        unchanged = model if close is None and self.steps == 1 else None
        return unchanged, kept, note, scores, statistics

    def _said(self, config: Any, shapes: Shapes, scores: Scores, wish: Wish) -> tuple[dict[str, np.ndarray], str]:
        """The plan nearest to what the scores ask for that the family's config can say, and what that gave up."""
        wanted = choose(shapes, scores, wish)
        nearest = alike(shapes, scores, wanted, wish)
        kept = alike(shapes, scores, wanted, wish, lambda some: expressible(config, shapes.anatomy, some))
        left = f"layers.{kept['layers'][0] if 'layers' in kept else 0}.heads"
        counts = [len(plan.get(left, range(shapes.anatomy.kv_heads))) for plan in (nearest, kept)]
        streams = [len(plan.get("hidden", range(shapes.anatomy.hidden))) for plan in (nearest, kept)]
        if streams[0] != streams[1]:
            return kept, f"a {config.model_type} config cannot say a stream of {streams[0]}: {streams[1]} remain"
        if counts[0] == counts[1]:
            return kept, _apart(shapes, wanted, kept, wish)
        said = f"a {config.model_type} config cannot say {counts[0]} of {shapes.anatomy.kv_heads} KV heads"
        if not kept:
            raise Refusal(f"prune.kinds={list(self.kinds)}: {said}, nor any other number but all; name other kinds")
        return kept, f"{said}: {counts[1]} remain"

    def _open(self, context: Context, place: torch.device) -> tuple[Any, Callable[[], None] | None]:
        """The model to be scored, and how to be rid of it where it is sharded."""
        strategy = context.config["strategy"]
        if self.ranks(context) == 1 or strategy.get("stage") != 3:
            return load_model(self.model, **self._words).to(place), None
        config = zero3(self.dtype, "cpu" if strategy["offload_parameters"] else "none")
        model = load_sharded(self.model, config, **self._words)
        return model, engine_of(model, config).destroy

    def _statistics(
        self, context: Context, tokenizer: Any, model: Any, anatomy: Anatomy, kept: Kept, step: int
    ) -> Statistics:
        """What calibration text says, or what files have of it; gone on with where a killed run was."""
        if self.scores is not None:
            return self._added(context)
        if not self.importance.needs_calibration_data:
            return {}
        path = context.work / f"{step}.{artifact.SCORES}"
        before, done = read_partial_scores(path, context.fingerprint)
        world = self.ranks(context)
        place = torch.device("cpu")
        if context.device == "cuda":
            place = torch.device("cuda", torch.cuda.current_device())
        batches = self._batches(context, tokenizer, "train", self.calibration, context.rank, world, place)
        if context.rank == 0:  # of several ranks, its share; there can be less text than was asked for
            rows, tokens = (sum(int(each.sum()) for each in some) for some in zip(*map(_counts, batches), strict=True))
            print(f"{context.stage}: scoring on {rows:,} samples with {tokens:,} tokens to predict", flush=True)

        def after(statistics: Statistics) -> None:
            nonlocal done
            done += 1
            if context.rank == 0:
                write_partial_scores(path, statistics, context.fingerprint, done)

        left = shown(batches[done:], len(batches) - done, "scoring", context.rank == 0 and len(batches) - done > 1)
        with silent_experts(model, anatomy, kept):
            return scoring.gather(self.importance, model, anatomy, self.kinds, left, before, after)

    def _scored(self, context: Context) -> dict[str, Any]:
        """What has to be equal for statistics to be added up."""
        importance = context.config["stages"][context.stage]["importance"]
        model = context.parents.get("model", {}).get("content_hash")  # None in the check
        importance = {name: value for name, value in importance.items() if name != "reduction"}  # of what is gathered
        return {"model": model, "importance": importance, "kinds": sorted(self.kinds)}

    @staticmethod
    def _check_scores(path: Path, of: dict[str, Any], wanted: dict[str, Any]) -> None:
        if odd := [name for name, value in wanted.items() if value is not None and of.get(name) != value]:
            raise Refusal(f"prune.scores={path}: these are of another {odd[0]}; score this one's text anew")

    def _added(self, context: Context) -> Statistics:
        total: Statistics = {}
        for path in self._files:
            statistics, of = read_scores(path)
            self._check_scores(path, of, self._scored(context))
            total = {name: total[name] + values if total else values for name, values in statistics.items()}
        return total

    def _batches(
        self,
        context: Context,
        tokenizer: Any,
        split: str,
        calibration: Calibration,
        rank: int = 0,
        world: int = 1,
        place: torch.device | str = "cpu",
    ) -> list[dict[str, Tensor]]:
        """Samples of a split, this rank's part of them; the same for the same seed."""
        folder = json.loads((context.work / "prepared.json").read_text())[split]
        if folder is None:
            return []
        rows = load_from_disk(folder)
        draw = np.random.default_rng([self.seed, *split.encode()])
        samples = calibration.take("prune", rows, draw)
        if not samples:
            raise Refusal(f"{context.stage}: no row of data.{split} has a token to predict, to score units on")
        names = list(samples[0])
        batches = []
        for first in range(0, len(samples), calibration.batch_size):
            mine = samples[first : first + calibration.batch_size][rank::world]
            batch = collate(mine or [blank(names, pad_token(tokenizer))], pad_token=pad_token(tokenizer))
            batches.append({name: batch[name].to(place) for name in names})
        return batches

    @torch.no_grad()
    def _proof(
        self, context: Context, tokenizer: Any, model: Any, anatomy: Anatomy, kept: Kept, folder: Path
    ) -> dict[str, Any]:
        """The masked model's logits against those of the folder that was written, on text. `model` becomes masked."""
        place = next(model.parameters()).device
        few = replace(self.calibration, samples=_PROOF_SAMPLES, concatenated=False)
        batches = self._batches(context, tokenizer, "validation", few, place=place)
        batches = batches or self._batches(context, tokenizer, "train", few, place=place)
        silence(model, anatomy, kept)
        cut = load_model(str(folder), **{**self._words, "role": "pruned"}).to(place)
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


def _counts(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Rows that predict something, and tokens to predict."""
    real_BT = batch["targets"] != IGNORED
    return real_BT.any(1), real_BT


def _apart(shapes: Shapes, wanted: Kept, kept: Kept, wish: Wish) -> str:
    """What was given up for one width in all layers."""
    if not kept:
        return "rounded to whole units, nothing goes; a smaller kept_fraction cuts"
    sizes = shapes.size(wanted).parameters, shapes.size(kept).parameters
    if sizes[0] == sizes[1]:
        return ""
    told = (
        f"the scores ask for other widths in other layers ({sizes[0]:,} parameters); a config has one for all: the "
        f"nearest such plan has {sizes[1]:,}"
    )
    if wish.protect_first + wish.protect_last and set(wish.kinds) - {"layers"}:
        told += "; layers that were to be protected have it too, and only moved the average"
    return told
