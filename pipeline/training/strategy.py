"""How one training step is spread over processes: a class per kind in conf/strategy/*.yaml.

DeepSpeed runs on CUDA as Lightning intends, and on CPU ranks over gloo through the same code, so that the production
path is tested where there is no GPU.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, ClassVar, Protocol

from models.errors import Refusal
from pipeline.config import nearest

_COMMUNICATED = (None, "fp32", "bf16")
_LEAST_SWAPPED = 2**18  # elements, of 4 bytes


class Strategy(Protocol):
    """What the rest of the house asks of a strategy."""

    @property
    def several_ranks(self) -> bool:
        """Whether a stage that trains may be more than one process."""
        ...

    @property
    def sharded(self) -> bool:
        """Whether a checkpoint is a folder with files of every rank, readable by as many ranks."""
        ...

    @property
    def shards_parameters(self) -> bool:
        """Whether no rank holds whole weights (ZeRO-3)."""
        ...

    @property
    def offloads_parameters(self) -> bool:
        """Whether sharded weights wait in host memory until they are needed."""
        ...

    def check(self, device: str, ranks: int) -> None:
        """Refuse what cannot work on so many ranks of `device`, cpu or cuda."""
        ...

    def lightning(self, device: str) -> Any:
        """What `Trainer(strategy=…)` takes; device is cpu or cuda."""
        ...


def _patience(timeout_minutes: float) -> timedelta:
    """Of a process group: the watchdog is to end the job first, after `timeout_minutes`: it names the rank."""
    return timedelta(minutes=timeout_minutes + 5)


@dataclass(frozen=True)
class Single:
    """One process, no process group."""

    several_ranks: ClassVar[bool] = False
    sharded: ClassVar[bool] = False
    shards_parameters: ClassVar[bool] = False
    offloads_parameters: ClassVar[bool] = False

    def check(self, device: str, ranks: int) -> None:
        if ranks > 1:
            raise Refusal(
                f"strategy=single runs one process, and trainer asks for {ranks}; use strategy=ddp, zero2 or zero3"
            )

    def lightning(self, device: str) -> Any:
        return "auto"


@dataclass(frozen=True)
class DDP:
    """Every rank holds the whole model; gradients are averaged."""

    several_ranks: ClassVar[bool] = True
    sharded: ClassVar[bool] = False
    shards_parameters: ClassVar[bool] = False
    offloads_parameters: ClassVar[bool] = False
    timeout_minutes: float = 30.0

    def check(self, device: str, ranks: int) -> None:
        """Any number of ranks will do."""

    def lightning(self, device: str) -> Any:
        from pytorch_lightning.strategies import DDPStrategy

        return DDPStrategy(
            timeout=_patience(self.timeout_minutes),
            find_unused_parameters=False,
            process_group_backend="gloo" if device == "cpu" else "nccl",
        )


@dataclass(frozen=True)
class ZeRO:
    """DeepSpeed ZeRO: stage 1 shards optimizer states, 2 gradients as well, 3 parameters as well.

    `config` is merged over DeepSpeed's `zero_optimization` section, e.g. bucket sizes,
    stage3_param_persistence_threshold, or what ZeRO++ (arXiv:2306.10209) adds to ZeRO-3.
    `communication_dtype`: gradients are summed over the ranks in it. What is offloaded waits in host memory; under
    ZeRO-3 the optimizer's states and the masters may be in files in `nvme_path`, a folder of each machine.
    """

    several_ranks: ClassVar[bool] = True
    sharded: ClassVar[bool] = True
    stage: int
    offload_optimizer: bool = False
    offload_parameters: bool = False
    nvme_path: str | None = None
    timeout_minutes: float = 30.0
    communication_dtype: str | None = None
    config: dict[str, Any] | None = None

    @property
    def copies_within(self) -> int:
        """Ranks that hold all weights between them a second time, so that the backward pass gathers them there (hpZ);
        1: none do."""
        return int((self.config or {}).get("zero_hpz_partition_size", 1))

    def check(self, device: str, ranks: int) -> None:
        given = self.config or {}
        if self.communication_dtype not in _COMMUNICATED:
            names = ", ".join(str(name or "null") for name in _COMMUNICATED)
            raise Refusal(f"strategy.communication_dtype={self.communication_dtype}: need one of {names}")
        if "zero_optimization" in given:
            raise Refusal(
                "strategy.config.zero_optimization: strategy.config is that section; leave zero_optimization out"
            )
        if "stage" in given:
            raise Refusal(f"strategy.config.stage={given['stage']}: choose strategy=zero1, zero2 or zero3 instead")
        for key, own in {"offload_optimizer": "offload_optimizer", "offload_param": "offload_parameters"}.items():
            if key in given:
                raise Refusal(f"strategy.config.{key}: Retort fills it in; set strategy.{own}=true instead")
        if given:
            _check_keys(given)
        self._check_nvme()
        for key in (key for key in given if key.startswith(("zero_hpz", "zero_quantized"))):
            if self.stage != 3 and given[key] is not False and (given[key] is True or given[key] != 1):
                value = str(given[key]).lower()
                raise Refusal(f"strategy.config.{key}={value}: ZeRO++ is of ZeRO-3; use strategy=zeropp or zero3")
            if given[key] is True and device != "cuda":
                raise Refusal(f"strategy.config.{key}=true: DeepSpeed quantizes on GPUs only; set it to false")
        if ranks % max(1, self.copies_within):
            raise Refusal(
                f"strategy.config.zero_hpz_partition_size={self.copies_within}: {ranks} ranks are no multiple of it; "
                f"give the ranks of a node"
            )

    @property
    def stepped_at_a_time(self) -> int:
        """Elements of a sub-group: what the optimizer steps, and NVMe gives, at a time."""
        return int((self.config or {}).get("sub_group_size", 1_000_000_000))

    def _check_nvme(self) -> None:
        """The folder itself is looked at where the ranks run."""
        if self.nvme_path is None:
            return
        if not isinstance(self.nvme_path, str) or not self.nvme_path:
            raise Refusal(f"strategy.nvme_path={self.nvme_path}: need a folder on a disk of each machine, or null")
        if self.stage != 3 or not self.offload_optimizer:
            raise Refusal(
                f"strategy.nvme_path={self.nvme_path}: it is for the optimizer that ZeRO-3 offloads; use "
                f"strategy=zero3_nvme, or leave it out"
            )
        if self.stepped_at_a_time < _LEAST_SWAPPED:
            raise Refusal(
                f"strategy.config.sub_group_size={self.stepped_at_a_time}: DeepSpeed leaves in memory what has less "
                f"than 1 MB; need {_LEAST_SWAPPED:,} elements or more"
            )

    @property
    def shards_parameters(self) -> bool:
        return self.stage == 3

    @property
    def offloads_parameters(self) -> bool:
        return self.shards_parameters and self.offload_parameters

    def lightning(self, device: str) -> Any:
        from models import nvme
        from models.sharding import offloaded

        section: dict[str, Any] = {
            "stage": self.stage,
            "overlap_comm": device == "cuda",
            "contiguous_gradients": True,
            "stage3_gather_16bit_weights_on_model_save": False,
            **(self.config or {}),
        }
        if self.offload_optimizer:
            folder = None if self.nvme_path is None else nvme.folder_in(self.nvme_path)
            section["offload_optimizer"] = offloaded(device == "cuda", folder)
        if self.offload_parameters:
            section["offload_param"] = offloaded(device == "cuda")
        return _zero_strategy()(
            config={
                "zero_optimization": section,
                "zero_allow_untested_optimizer": True,
                # DeepSpeed's own CPU Adam is compiled at first use, for minutes; torch's AdamW needs nothing.
                "zero_force_ds_cpu_optimizer": False,
                **({"communication_data_type": self.communication_dtype} if self.communication_dtype else {}),
                "train_micro_batch_size_per_gpu": 1,  # only its throughput timer reads it
            },
            exclude_frozen_parameters=True,  # the teacher belongs in no checkpoint
            timeout=_patience(self.timeout_minutes),
            process_group_backend="gloo" if device == "cpu" else "nccl",
        )


def _check_keys(given: dict[str, Any]) -> None:
    """Against DeepSpeed's own schema, which takes seconds to import; only where there is something to check."""
    prepare_environment("cpu")
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    try:
        DeepSpeedZeroConfig(**given)
    except ValidationError as problem:
        first = problem.errors()[0]
        key = ".".join(map(str, first["loc"]))
        known = [name for each, field in DeepSpeedZeroConfig.model_fields.items() for name in (field.alias or each,)]
        if first["type"] != "extra_forbidden":
            raise Refusal(f"strategy.config.{key}: DeepSpeed says {first['msg'].lower()}") from None
        close = nearest(key, known)
        more = close if close.startswith("; did") else "; batch, clipping and precision are Retort's own keys"
        raise Refusal(f"strategy.config.{key}: unknown in DeepSpeed's section zero_optimization{more}") from None


def _zero_strategy() -> type:
    import torch
    from pytorch_lightning.accelerators import CUDAAccelerator
    from pytorch_lightning.strategies import DDPStrategy, DeepSpeedStrategy

    class ZeroStrategy(DeepSpeedStrategy):
        """Lightning's DeepSpeedStrategy, able to run on CPU ranks, and with three defects mended (on CUDA too)."""

        @property
        def root_device(self) -> torch.device:
            if self._on_cpu:
                return torch.device("cpu", 0)  # an index, which DeepSpeed insists on
            return super().root_device

        @property
        def _on_cpu(self) -> bool:
            return not isinstance(self.accelerator, CUDAAccelerator)

        def setup_environment(self) -> None:
            if self._on_cpu:
                import deepspeed.ops

                # The shared-memory collective would be compiled on first use, for minutes.
                deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
                DDPStrategy.setup_environment(self)
            else:
                super().setup_environment()

        def setup_distributed(self) -> None:
            if self._on_cpu:
                from lightning_fabric.utilities.seed import reset_seed

                reset_seed()
                self.set_world_ranks()
                self._init_deepspeed_distributed()
            else:
                super().setup_distributed()

        def _format_config(self) -> None:
            super()._format_config()
            assert self.config is not None
            if self.config.get("bf16", {}).get("enabled"):
                # Else the gradients of an accumulated step are added up in bf16, where 1 + 2⁻⁹ is 1.
                self.config.setdefault("data_types", {"grad_accum_dtype": "fp32"})
                if self.config["zero_optimization"]["stage"] == 1:  # which sums up over the ranks once, at the end
                    self.config.setdefault("communication_data_type", "fp32")

        def backward(self, closure_loss: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
            # Lightning has divided by the accumulation already; DeepSpeed would divide again, which halves gradients
            # and makes clipping wrong.
            return super().backward(closure_loss, optimizer, *args, scale_wrt_gas=False, **kwargs)

        @contextmanager
        def model_sharded_context(self) -> Iterator[None]:
            """Let transformers open its own zero.Init. Inside Lightning's, fresh weights come out with the wrong
            spread, from_pretrained raises on padding tokens, and rotary frequencies are rounded to bf16."""
            self._init_config_if_needed()
            if self.zero_stage_3:
                from transformers.integrations.deepspeed import HfDeepSpeedConfig

                self._transformers_config = HfDeepSpeedConfig(self.config)  # alive as long as the strategy
                _make_groups_once()
            yield

    return ZeroStrategy


def _make_groups_once() -> None:
    """Of ZeRO++: DeepSpeed makes the groups of ranks with every model, and the teacher's is the second."""
    from deepspeed.utils import groups

    make = groups._create_zero_param_parallel_group

    def once(size: int) -> None:
        if groups._get_zero_param_intra_parallel_group() is None:
            make(size)

    groups._create_zero_param_parallel_group = once


def prepare_environment(device: str) -> None:
    """Before deepspeed is imported for the first time."""
    if device == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
