"""Models whose weights ZeRO-3 has spread over the ranks: opening them, and bringing parts of them together."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from models.load import load_model


def gathered(parameters: Iterable[nn.Parameter], changed: bool = False) -> Any:
    """A context in which ZeRO-3 shards are whole; nothing elsewhere. Every rank must enter it.

    `changed`: what is written to them in it is kept, as the first rank has it.
    """
    sharded = [p for p in parameters if hasattr(p, "ds_id")]
    if not sharded:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(sharded, modifier_rank=0 if changed else None)


def gathered_weights(
    model: nn.Module,
    keep: bool,
    dtype: torch.dtype | None = None,
    wanted: Callable[[str], bool] = lambda _: True,
    after: Callable[[], None] = lambda: None,
) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of the state dict, one after the other, in the host memory of the rank that says `keep` (others
    get nothing), in `dtype` where that is given. One parameter is whole at a time, so that a sharded model never has to
    fit a device, nor a host. The names of a tied table follow each other, with one tensor. Every rank must exhaust it
    with the same `wanted` names. `after` is called after each tensor."""
    saved = model.state_dict().keys()
    names: dict[int, list[str]] = defaultdict(list)
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    for name, tensor in tensors.items():
        if name in saved and wanted(name):
            names[id(tensor)].append(name)
    for tied in names.values():
        tensor = tensors[tied[0]]
        with gathered([tensor]) if isinstance(tensor, nn.Parameter) else nullcontext():
            fits = dtype if tensor.is_floating_point() else None
            whole = tensor.detach().to("cpu", fits or tensor.dtype, copy=True) if keep else None
        after()
        if whole is not None:
            yield from ((name, whole) for name in tied)


def gather_children(module: nn.Module, _: Any) -> None:
    """A forward pre-hook of a module that uses its children's weights without calling them: under ZeRO-3 they are
    gathered with its own."""
    for parameter in (each for child in module.children() for each in child.parameters()):
        if hasattr(parameter, "ds_id"):
            import deepspeed

            deepspeed.zero.register_external_parameter(module, parameter)


def zero3(dtype: str, offload: str = "none", folder: str | None = None, buffer_size: int = 0) -> dict[str, Any]:
    """DeepSpeed's configuration of a model that is not trained; `offload`: none, cpu or nvme, where its shares lie:
    files in `folder` that come through buffers of `buffer_size` elements, as many as the largest share has."""
    section: dict[str, Any] = {"stage": 3, "stage3_param_persistence_threshold": 0}
    if offload != "none":
        section["offload_param"] = offloaded(torch.cuda.is_available(), folder)
    if folder is not None:
        section["offload_param"]["buffer_size"] = buffer_size
    return {
        "zero_optimization": section,
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": dtype == "bfloat16"},
        "fp16": {"enabled": dtype == "float16"},
    }


def offloaded(cuda: bool, folder: str | None = None) -> dict[str, Any]:
    """DeepSpeed's section of what is offloaded: to host memory, or to a `folder` that models.nvme has made."""
    if folder is None:
        return {"device": "cpu", "pin_memory": cuda}
    return {"device": "nvme", "nvme_path": folder, "pin_memory": cuda}


def load_sharded(path: str, config: dict[str, Any], **words: Any) -> Any:
    """As models.load.load_model, straight into shards, in eval mode and frozen; `config` is DeepSpeed's."""
    from transformers.integrations import deepspeed as bridge

    start_deepspeed()
    # While a config is registered transformers loads straight into shards. The student's, if it is under ZeRO-3
    # itself, comes back afterwards.
    students = bridge._hf_deepspeed_config_weak_ref
    mine = bridge.HfDeepSpeedConfig(config)
    try:
        model = load_model(path, **words)
    finally:
        bridge._hf_deepspeed_config_weak_ref = students
        del mine
    return model.eval().requires_grad_(False)


def engine_of(module: nn.Module, config: dict[str, Any]) -> Any:
    """DeepSpeed's, which gathers what `module` needs when it needs it."""
    engine, *_ = start_deepspeed().initialize(model=module, config=config)
    engine.eval()
    return engine


def start_deepspeed() -> Any:
    """DeepSpeed with a process group: the one there is, else a group of one."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0"))  # zero.Init reads it
    import deepspeed

    if not torch.cuda.is_available():
        import deepspeed.ops

        # The shared-memory collective would be compiled on first use, for minutes.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not torch.distributed.is_initialized():
        from torch._C._distributed_c10d import HashStore

        backend = "nccl" if torch.cuda.is_available() else "gloo"
        torch.distributed.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(dist_backend=torch.distributed.get_backend(), verbose=False)
    return deepspeed
