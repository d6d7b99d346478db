"""The plan that is carried out: of those that the family's config can express, the one nearest to what the scores ask
for."""

from __future__ import annotations

from typing import Any

import numpy as np

from models.errors import Refusal
from models.pruning.plan import Scores, Wish, alike, choose
from models.pruning.sizes import Shapes
from models.pruning.surgery import Kept, expressible


def feasible(config: Any, shapes: Shapes, scores: Scores, wish: Wish) -> tuple[dict[str, np.ndarray], str]:
    """Kept units, and a note on what was given up for them, or "". `config`: of the whole model.

    Raises Refusal where the config can express nothing but the whole model, or the budget cannot be met.
    """
    wanted = choose(shapes, scores, wish)
    nearest = alike(shapes, scores, wanted, wish)
    kept = alike(shapes, scores, wanted, wish, lambda some: expressible(config, shapes.anatomy, some))
    left = f"layers.{kept['layers'][0] if 'layers' in kept else 0}.heads"
    counts = [len(plan.get(left, range(shapes.anatomy.kv_heads))) for plan in (nearest, kept)]
    streams = [len(plan.get("hidden", range(shapes.anatomy.hidden))) for plan in (nearest, kept)]
    if streams[0] != streams[1]:
        return kept, f"a {config.model_type} config cannot express a hidden size of {streams[0]}: {streams[1]} remain"
    if counts[0] == counts[1]:
        return kept, _given_up(shapes, wanted, kept, wish)
    reason = f"a {config.model_type} config cannot express {counts[0]} of {shapes.anatomy.kv_heads} KV heads"
    if not kept:
        raise Refusal(f"prune.kinds={list(wish.kinds)}: {reason}, nor any other number but all; name other kinds")
    return kept, f"{reason}: {counts[1]} remain"


def _given_up(shapes: Shapes, wanted: Kept, kept: Kept, wish: Wish) -> str:
    """What was given up for one width in all layers."""
    if not kept:
        return "rounded to whole units, nothing is removed; set a smaller kept_fraction"
    sizes = shapes.size(wanted).parameters, shapes.size(kept).parameters
    if sizes[0] == sizes[1]:
        return ""
    note = (
        f"the scores ask for different widths in different layers ({sizes[0]:,} parameters); a config has one for all: "
        f"the nearest such plan has {sizes[1]:,}"
    )
    if wish.protect_first + wish.protect_last and set(wish.kinds) - {"layers"}:
        note += "; protected layers have that width too, and only moved the average"
    return note
