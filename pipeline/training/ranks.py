"""The process group of a stage that runs on several ranks without Lightning, and who watches over it."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
from torch import nn

from pipeline.context import Context

_heart: Any = None  # of this process, as the process group is; None on one rank, or where nobody is to watch


def join(context: Context) -> torch.device:
    """A process group over the ranks that torchrun or srun has started, and this rank's device."""
    from lightning_fabric.plugins.environments.slurm import SLURMEnvironment
    from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment

    from pipeline.training.observers import watchdog_of

    device = context.device
    here = TorchElasticEnvironment() if TorchElasticEnvironment.detect() else SLURMEnvironment(auto_requeue=False)
    if here.global_rank() == 0 and (watchdog := watchdog_of(context)) is not None:
        watchdog.clear()  # before there is a group, and so before any rank is watched
    torch.distributed.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        init_method=f"tcp://{here.main_address}:{here.main_port}",
        rank=here.global_rank(),
        world_size=here.world_size(),
        timeout=timedelta(hours=12),  # ranks may finish far apart; the watchdog ends the job where none gets on
    )
    place = torch.device(device, here.local_rank()) if device == "cuda" else torch.device(device)
    if device == "cuda":
        torch.cuda.set_device(place)
    return place


def watch(context: Context, model: Any = None, unit: str = "batch") -> None:
    """From here on ranks watch each other (callbacks.watchdog), until `unwatch` or `leave`. Not while a model is read:
    that may take long, and has no steps. Every forward of `model` (or a teacher, once it has been read) is a sign of
    life, since a batch of long answers takes many. Nothing on one rank."""
    global _heart
    group = torch.distributed
    if _heart is not None or not group.is_initialized() or group.get_world_size() == 1:
        return
    from pipeline.training.observers import watchdog_of

    if (watchdog := watchdog_of(context)) is not None:
        _heart = watchdog.begin(group.get_rank(), group.get_world_size(), unit)
    read = model if isinstance(model, nn.Module) else getattr(model, "model", None)  # a sharded teacher is no module
    for module in () if read is None else read.modules():
        if isinstance(module, nn.Embedding):  # once in every forward, whoever calls it
            module.register_forward_hook(lambda *_: beat())


def beat() -> None:
    """This rank has got on."""
    if _heart is not None:
        _heart.progress += 1


def unwatch() -> None:
    global _heart
    if _heart is not None:
        _heart.stop()
        _heart = None


def leave(context: Context) -> None:
    """End the process group once every rank is done: whoever left earlier would break off what others still send."""
    watch(context)  # who had nothing to do waits for the others, too
    beat()
    torch.distributed.barrier()
    unwatch()
    torch.distributed.destroy_process_group()
