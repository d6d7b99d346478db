"""Training a model folder on text into an artifact: what the stages that train call, on every rank."""

from __future__ import annotations

from pipeline.context import Context
from pipeline.training.fit import fit
from pipeline.training.recipe import Recipe
from pipeline.training.settle import settle


def train(context: Context, recipe: Recipe) -> None:
    """Train `<work>/start` on the text that `prepare` has prepared, and publish `<run_dir>/<stage>/`."""
    settle(context, fit(context, recipe))
