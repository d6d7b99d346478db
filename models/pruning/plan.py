"""Which units are removed: scores → kept units, within a budget and in widths that a checkpoint's config can express.

All can be worked out without weights: what units cost is known from the shapes alone (models/pruning/sizes.py).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from models.errors import Refusal
from models.pruning.groups import KINDS, Anatomy, Group
from models.pruning.sizes import PER, Shapes
from models.pruning.surgery import Kept

Scores = Mapping[str, np.ndarray]  # group → Float64[units]: what is lost with a unit
RANKINGS = ("layer", "global")
_BISECTIONS = 60
_TRIES = 64  # widths of the stream, for one that a config can express


@dataclass(frozen=True)
class Wish:
    """What is asked of a plan."""

    kinds: Sequence[str] = ("heads", "mlp")
    kept_fraction: float | None = 0.8  # of the units of every group; ranked globally, of their parameters
    target_parameters: int | None = None
    target_bytes: int | None = None  # of the weights in 16 bits
    ranking: str = "layer"
    per: str = "parameter"  # global: a unit's score counts by what the unit costs
    protect_first: int = 0  # layers that lose nothing
    protect_last: int = 0
    multiple_of: int = 1  # of the widths of mlp and hidden that remain

    def after(self, step: int, steps: int, whole: int) -> Wish:
        """What is asked for after so many of `steps` equal ones, of a model of `whole` parameters."""
        share = step / steps
        if self.kept_fraction is not None:
            return replace(self, kept_fraction=1 - (1 - self.kept_fraction) * share)
        if self.target_parameters is not None:
            return replace(self, target_parameters=round(whole - (whole - self.target_parameters) * share))
        assert self.target_bytes is not None
        return replace(self, target_bytes=round(2 * whole - (2 * whole - self.target_bytes) * share))

    def check(self, layers: int, whole: int) -> None:
        """Of a model of so many layers and parameters."""
        for kind in self.kinds:
            if kind not in KINDS:
                raise Refusal(f"prune.kinds: {kind} is none of {', '.join(KINDS)}")
        if not self.kinds:
            raise Refusal(f"prune.kinds=[]: nothing may be removed; name some of {', '.join(KINDS)}")
        given = {
            name: value
            for name in ("kept_fraction", "target_parameters", "target_bytes")
            if (value := getattr(self, name)) is not None
        }
        if len(given) != 1:
            raise Refusal(f"pruning: {' and '.join(given) or 'no budget'} given; need one, the others null")
        for name, value in {**given, "multiple_of": self.multiple_of}.items():
            if isinstance(value, bool) or not isinstance(value, (int, float) if name == "kept_fraction" else int):
                raise Refusal(f"prune.{name}={value}: need a {'' if name == 'kept_fraction' else 'whole '}number")
            if name.startswith("target") and not value > 0:
                raise Refusal(f"prune.{name}={value}: need a number above 0")
        if self.target_parameters is not None and self.target_parameters > whole:
            raise Refusal(f"prune.target_parameters={self.target_parameters}: the model has {whole:,} only")
        if self.target_bytes is not None and self.target_bytes > 2 * whole:
            raise Refusal(f"prune.target_bytes={self.target_bytes}: the model has {2 * whole:,} only, in 16 bits")
        if self.kept_fraction is not None and not 0 < self.kept_fraction <= 1:
            raise Refusal(f"prune.kept_fraction={self.kept_fraction}: need (0, 1]; 0.8 keeps 80 %")
        if self.ranking not in RANKINGS:
            raise Refusal(f"prune.ranking={self.ranking}: need one of {', '.join(RANKINGS)}")
        if self.per not in PER:
            raise Refusal(f"prune.per={self.per}: need one of {', '.join(PER)}")
        for name in ("protect_first", "protect_last"):
            if getattr(self, name) < 0:
                raise Refusal(f"prune.{name}={getattr(self, name)}: need 0 or more layers")
        if self.protect_first + self.protect_last >= layers:
            few = int(layers > 2)
            raise Refusal(
                f"prune.protect_first={self.protect_first} and protect_last={self.protect_last} leave none of {layers} "
                f"layers to prune; use e.g. prune.protect_first={few} prune.protect_last={few}"
            )
        if self.multiple_of < 1:
            raise Refusal(f"prune.multiple_of={self.multiple_of}: need 1 or more; 64 suits tensor cores")


def choose(shapes: Shapes, scores: Scores, wish: Wish) -> dict[str, np.ndarray]:
    """What the scores would keep, layer by layer; widths may differ between layers.

    The same scores and a smaller budget keep a part of it. Raises Refusal where nothing of the kinds is there, or a
    budget cannot be met.
    """
    wish.check(shapes.anatomy.layers, shapes.size({}).parameters)
    groups = _open(shapes.anatomy, wish)
    for group in groups:
        if not np.isfinite(scores[group.name]).all():
            raise Refusal(f"{group.name}: its scores hold values that are no numbers; see to the calibration text")
    ranked = {group.name: _ranked(group, scores[group.name], wish, shapes.anatomy) for group in groups}
    if wish.ranking == "layer" and wish.kept_fraction is not None:
        return _of_each(groups, ranked, wish, wish.kept_fraction, _step(shapes.anatomy, wish))
    target = _target(shapes, groups, wish)
    if wish.ranking == "layer":
        low, high, step = 0.0, 1.0, _step(shapes.anatomy, wish)
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            fits = shapes.size(_of_each(groups, ranked, wish, middle, step)).parameters <= target
            low, high = (middle, high) if fits else (low, middle)
        kept = _of_each(groups, ranked, wish, low, step)
    else:
        kept = _of_all(shapes, groups, ranked, scores, wish, target)
    if (smallest := shapes.size(kept).parameters) > target:
        raise Refusal(
            f"pruning: {target:,} parameters at most are asked for, and the fewest that can remain are {smallest:,} "
            f"(kinds {', '.join(wish.kinds)}, per={wish.per}, multiple_of={wish.multiple_of}); ask for more, or name "
            f"more kinds"
        )
    return kept


def alike(
    shapes: Shapes, scores: Scores, wanted: Kept, wish: Wish, expressible: Callable[[Kept], bool] = lambda kept: True
) -> dict[str, np.ndarray]:
    """The nearest plan with one width for all layers: of each kind as many units as `wanted` keeps on average.

    Each group chooses its own units. Protected layers are pruned like the others. Of heads,
    the nearest number that is `expressible` by the family's config, all of them if need be.
    """
    anatomy = shapes.anatomy
    made = {name: units for name, units in wanted.items() if anatomy.groups[name].kind in ("hidden", "layers")}
    layers = wanted.get("layers", np.arange(anatomy.layers))
    groups, counts = {}, {}
    for kind in ("heads", "mlp", "experts"):
        of_kind = [group for group in anatomy.of(kind) if group.layer in layers]
        if kind not in wish.kinds or not of_kind:
            continue
        if len(widths := {group.units for group in of_kind}) > 1:
            raise Refusal(
                f"prune.kinds: {kind} are of {' and '.join(map(str, sorted(widths)))} units in different layers, which "
                f"cannot be pruned together; leave {kind} out"
            )
        groups[kind] = of_kind
        mean = sum(len(wanted[group.name]) if group.name in wanted else group.units for group in of_kind) / len(of_kind)
        counts[kind] = _multiple(mean, of_kind[0].units, _step(anatomy, wish) if kind == "mlp" else 1)

    def of(counted: Mapping[str, int]) -> dict[str, np.ndarray]:
        """The plan with so many units of each kind in every layer."""
        pruned = {g.name: np.sort(_order(scores[g.name])[: counted[kind]]) for kind in counted for g in groups[kind]}
        return {name: units for name, units in (made | pruned).items() if len(units) < anatomy.groups[name].units}

    if "heads" in counts:
        units = groups["heads"][0].units
        nearest = sorted(range(1, units), key=lambda n: (abs(n - counts["heads"]), n))
        counts["heads"] = next((n for n in nearest if counts["heads"] < units and expressible(of({"heads": n}))), units)
    if "hidden" in made and "hidden" in scores:
        units, step = anatomy.groups["hidden"].units, _step(anatomy, wish)
        wished = len(made["hidden"])
        nearest = sorted(range(step, units, step), key=lambda n: (abs(n - wished), n))[:_TRIES]
        for number in [*nearest, units]:
            made["hidden"] = np.sort(_order(scores["hidden"])[:number])
            if number == units or expressible(of({kind: counts[kind] for kind in counts if kind == "heads"})):
                break
    if wish.kept_fraction is not None:  # a share, and nested
        return of(counts)
    return of(_within(shapes, wish, counts, {kind: some[0].units for kind, some in groups.items()}, of, expressible))


def _within(
    shapes: Shapes,
    wish: Wish,
    counts: dict[str, int],
    whole: Mapping[str, int],
    of: Callable[[Mapping[str, int]], dict[str, np.ndarray]],
    expressible: Callable[[Kept], bool],
) -> dict[str, int]:
    """Averages are rounded, and the budget is for all: of the plans that have a head or an expert more or less, and
    MLPs as wide as fits, the one that uses the budget best. Raises Refusal where none fits."""
    target = _target(shapes, _open(shapes.anatomy, wish), wish)
    step = _step(shapes.anatomy, wish)

    def filled(tried: dict[str, int]) -> dict[str, int]:
        if "mlp" not in tried:
            return tried
        low, high = 1, max(1, whole["mlp"] // step)
        while low < high:
            middle = (low + high + 1) // 2
            fits = shapes.size(of(tried | {"mlp": middle * step})).parameters <= target
            low, high = (middle, high) if fits else (low, middle - 1)
        return tried | {"mlp": min(low * step, whole["mlp"])}

    others = [kind for kind in counts if kind != "mlp"]
    furthest = 1 if "mlp" in counts else max([0, *(whole[kind] for kind in others)])
    best, used = None, -1
    for apart in range(furthest + 1):
        for moves in itertools.product((0, -apart, apart), repeat=len(others)):
            tried = counts | {kind: counts[kind] + move for kind, move in zip(others, moves, strict=True)}
            if any(not 1 <= tried[kind] <= whole[kind] for kind in others):
                continue
            tried = filled(tried)
            size = shapes.size(of(tried)).parameters
            moved = "heads" in tried and tried["heads"] not in (counts["heads"], whole["heads"])
            if used < size <= target and (not moved or expressible(of({"heads": tried["heads"]}))):
                best, used = tried, size
        if best is not None and "mlp" not in counts:
            break  # the nearest that fits; beyond it there is nothing better to be found within the budget
    if best is None:
        raise Refusal(
            f"pruning: {target:,} parameters at most are asked for, and no width that is the same in all layers meets "
            f"that by {', '.join(wish.kinds)}; ask for more, or name more kinds"
        )
    return best


def _step(anatomy: Anatomy, wish: Wish) -> int:
    """Of experts' widths PyTorch's grouped products take multiples of 16 bytes alone."""
    return math.lcm(wish.multiple_of, 8) if anatomy.of("experts") else wish.multiple_of


def _open(anatomy: Anatomy, wish: Wish) -> list[Group]:
    """Groups of which units may be removed."""
    last = anatomy.layers - wish.protect_last
    found = [
        group
        for group in anatomy.groups.values()
        if group.kind in wish.kinds and (group.layer is None or wish.protect_first <= group.layer < last)
    ]
    for kind in wish.kinds:
        if not anatomy.of(kind):
            raise Refusal(f"prune.kinds: this model has no {kind}")
    return found


def _order(scores: np.ndarray) -> np.ndarray:
    """Units, the most important first; of equals the first."""
    return np.argsort(-scores, kind="stable")


def _ranked(group: Group, scores: np.ndarray, wish: Wish, anatomy: Anatomy) -> np.ndarray:
    if group.kind != "layers":
        return _order(scores)
    guarded = scores.astype(float).copy()
    guarded[: wish.protect_first] = np.inf
    guarded[anatomy.layers - wish.protect_last :] = np.inf
    return _order(guarded)


def _multiple(count: float, units: int, of: int) -> int:
    """The nearest number of units that is a multiple; at least one, at most all."""
    nearest = of * max(1, math.floor(count / of + 0.5))
    return units if nearest >= units else nearest


def _of_each(
    groups: Sequence[Group], ranked: Mapping[str, np.ndarray], wish: Wish, fraction: float, step: int
) -> dict[str, np.ndarray]:
    kept = {}
    for group in groups:
        of = step if group.kind in ("mlp", "hidden") else 1
        count = max(_multiple(fraction * group.units, group.units, of), _guarded(group, wish))
        if count < group.units:
            kept[group.name] = np.sort(ranked[group.name][:count])
    return kept


def _guarded(group: Group, wish: Wish) -> int:
    return max(1, wish.protect_first + wish.protect_last) if group.kind == "layers" else 1


def _target(shapes: Shapes, groups: Sequence[Group], wish: Wish) -> int:
    """Parameters that may remain."""
    if wish.target_parameters is not None:
        return wish.target_parameters
    if wish.target_bytes is not None:
        return wish.target_bytes // 2
    assert wish.kept_fraction is not None
    whole = shapes.size({}).parameters
    least = shapes.size({group.name: np.arange(0) for group in groups}).parameters
    return least + math.floor(wish.kept_fraction * (whole - least))


def _of_all(
    shapes: Shapes,
    groups: Sequence[Group],
    ranked: Mapping[str, np.ndarray],
    scores: Scores,
    wish: Wish,
    target: int,
) -> dict[str, np.ndarray]:
    """Unit by unit over all groups, the most important for its cost first, as long as the budget lasts."""
    worth, owner = [], []
    for number, group in enumerate(groups):
        cost = shapes.cost(group, wish.per)
        each = scores[group.name][ranked[group.name]] / (cost or 1.0)
        guarded = _guarded(group, wish) if cost else group.units  # what costs nothing stays
        worth.append(np.concatenate([np.full(guarded, np.inf), each[guarded:]]))
        owner.append(np.full(group.units, number))
    worths, owners = np.concatenate(worth), np.concatenate(owner)
    order = np.argsort(-worths, kind="stable")

    def kept(count: int) -> dict[str, np.ndarray]:
        counts = np.bincount(owners[order[:count]], minlength=len(groups))
        return {
            group.name: np.sort(ranked[group.name][:n])
            for group, n in zip(groups, counts, strict=True)
            if n < group.units
        }

    low, high = int(np.isinf(worths).sum()), len(order)  # parameters grow with the count, whatever it is that is added
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if shapes.size(kept(middle)).parameters <= target else (low, middle - 1)
    return kept(low)
