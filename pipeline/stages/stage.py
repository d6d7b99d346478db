"""What a stage is: all that the walk (pipeline/run.py, pipeline/worker.py) and other stages know of it.

A stage of your own is a frozen dataclass that derives from `Stage`, in a file of its own here, and a yaml in
conf/stage that names it as `_target_` and sets its fields. An experiment takes it with `- /stage@stages.NAME: YAML` in
its defaults and names it in `order`. Nothing else is edited.

The life of a stage, by who calls it:

1. The check (one process, no weights, before any stage starts): `check`, then `ranks`, `parents` and `content`.
   Whatever can be refused from the configuration is refused here, by raising `Refusal` with the value and the remedy.
2. `prepare` (one process): everything that the ranks share, written below `context.work`.
3. `run` (on `ranks(context)` processes): the work. Rank 0 hands the result to `artifact.publish(context.out, …)`, with
   `context.manifest(self.makes)` and what was measured.

What the artifact of each kind holds, for the stages and the report that read it:

    model     a checkpoint that transformers opens, with its tokenizer; metrics.parameters
    answers   what pipeline/data/answer_files.py reads
    signal    what models/teachers/cache.py reads
    exports   a folder for each of `exports`; their figures, where the report is to show some, as
              metrics.formats: folder → figures
    results   metrics.rows and metrics.comparisons, as the stage evaluate writes them

A killed stage is started again with 2. and finds in `context.work` what it left there; once `context.out` is published,
`context.work` is removed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pipeline.artifact import Makes as Makes  # stages take it from here
from pipeline.context import Context
from pipeline.data.source import DataSource
from pipeline.forecast.workload import Workload as Workload  # stages take it from here

if TYPE_CHECKING:
    from models.formats.format import Format


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a stage will do, as its check knows it: shown before the run starts, and given to the walk."""

    model: str = ""  # model_type of what it makes, or of the teacher that it reads
    parameters: int | None = None  # of what it makes
    teacher: str = ""  # path and size
    until: str = ""  # what ends it: steps, samples, formats
    data: dict[str, Any] | None = None  # what `check_source` says of the text
    warnings: list[str] = field(default_factory=list)
    commits: dict[str, str | None] = field(default_factory=dict)  # role → commit, of parents that are hub ids
    content: str | None = None  # in place of `content()`, where more than the text decides what is made


Reading = tuple[DataSource, Any, Any]  # text, the tokenizer, and the teacher's where it reads other tokens


class Stage(ABC):
    """Reads artifacts and text, and makes one artifact, `context.out`."""

    makes: ClassVar[Makes]  # what stands in the artifact's folder, and as `kind` in its manifest
    on_demand: ClassVar[str] = ""  # what makes a run read its folder; where it does not, such a stage is left out
    immaterial: ClassVar[frozenset[str]] = frozenset()  # fields that change nothing it makes, beyond rounding
    shareable: ClassVar[bool] = False  # jobs with `share=I/N` may make parts, which it takes over (context.shares())

    # Asked of a stage's settings by stages before and after it, where others of its settings may not be given yet.

    @classmethod
    def multiple(cls, settings: Mapping[str, Any]) -> int:
        """What the widths of the model that it reads have to be a multiple of: a stage before it that prunes keeps such
        widths where its `multiple_of` is auto. 1: it takes any width."""
        return 1

    @classmethod
    def exports(cls, settings: Mapping[str, Any]) -> Mapping[str, Format]:
        """Of a stage that makes exports: folder → the format that writes it, with which evaluate opens it again."""
        return {}

    @abstractmethod
    def ranks(self, context: Context) -> int:
        """Processes that `run` needs: 1, or `context.world`."""

    @abstractmethod
    def parents(self, context: Context) -> dict[str, str]:
        """Role → folder, file or hub id of everything that it reads, but for text. Another parent makes it stale."""

    @abstractmethod
    def content(self) -> str:
        """Hash of the text that it reads, as `source_key` gives it; "" where it reads none."""

    @abstractmethod
    def check(self, context: Context) -> Plan:
        """Refuse what can be refused without weights. Of a model that it will make it calls `context.plan_model`, so
        that the stages after it can be checked too."""

    def reading(self, context: Context, scratch: Path) -> Reading | None:
        """Of a stage that trains: the text that it learns, and the tokenizers that read it, for `show_data`.

        What has to be made for that goes to `scratch`.
        """
        return None

    def workload(self, context: Context) -> Workload | None:
        """For `forecast=true`, in the check process and in place of `check`: what it computes, from configurations
        alone; neither weights nor tokenizers need be there. Of a model that it will make it calls `context.plan_model`.
        None: what it takes is little, or not known."""
        return None

    @abstractmethod
    def prepare(self, context: Context) -> None:
        """The part that one process does before the ranks start."""

    @abstractmethod
    def run(self, context: Context) -> None:
        """The work, on every rank; rank 0 publishes."""


def contract_of(context: Context, name: str) -> type[Stage]:
    """The class of a stage of this run, which is asked what does not take the stage itself."""
    from hydra.utils import get_class

    return get_class(context.config["stages"][name]["_target_"])
