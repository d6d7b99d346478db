"""The process group of a stage that runs on several ranks without Lightning."""

from __future__ import annotations

from datetime import timedelta

import torch


def join(device: str) -> torch.device:
    """A process group over the ranks that torchrun or srun has started, and this rank's device."""
    from lightning_fabric.plugins.environments.slurm import SLURMEnvironment
    from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment

    here = TorchElasticEnvironment() if TorchElasticEnvironment.detect() else SLURMEnvironment(auto_requeue=False)
    torch.distributed.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        init_method=f"tcp://{here.main_address}:{here.main_port}",
        rank=here.global_rank(),
        world_size=here.world_size(),
        timeout=timedelta(hours=12),  # ranks may finish far apart
    )
    place = torch.device(device, here.local_rank()) if device == "cuda" else torch.device(device)
    if device == "cuda":
        torch.cuda.set_device(place)
    return place


def leave() -> None:
    """End the process group once every rank is done: whoever left earlier would break off what others still send."""
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
