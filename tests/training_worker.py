"""What each process of test_training_processes.py does: the toy run as one of two, with and without sharding."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from training_toys import state_of, toy_trainer

from lcv_core.training import trainer as trainer_module
from lcv_core.training.checkpoints import whole
from lcv_core.training.trainer import Trainer, make_accelerator

NUM_PROCESSES = 2
TIMEOUT_S = 60


def sharding_accelerator(device: str = "cpu") -> Any:
    """accelerate's FSDP2, which it offers for GPUs alone, on CPUs."""
    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    accelerator = make_accelerator(device)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["Sequential"],
        cpu_ram_efficient_loading=False,
    )  # fmt: skip
    AcceleratorState._shared_state |= {"distributed_type": DistributedType.FSDP, "fsdp_plugin": plugin}
    return accelerator


def gathered(trainer: Trainer) -> dict[str, Any]:
    return {name: whole(value) for name, value in state_of(trainer).items()}


def main(rank: int, folder: str) -> None:
    """Writes {"ddp" or "fsdp": state after a run that was interrupted} to folder/rank.pt."""
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(NUM_PROCESSES), "OMP_NUM_THREADS": "1",
        "LOCAL_WORLD_SIZE": str(NUM_PROCESSES), "ACCELERATE_USE_CPU": "true",
    }  # fmt: skip
    store = f"file://{Path(folder) / 'store'}"
    timeout = timedelta(seconds=TIMEOUT_S)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=NUM_PROCESSES, timeout=timeout)
    trainer_module.draw_curves = lambda *_: None
    results: dict[str, Any] = {}
    for kind in ("ddp", "fsdp"):
        if kind == "fsdp":
            trainer_module.make_accelerator = sharding_accelerator
        out = Path(folder) / kind
        toy_trainer(out, steps=5).run()
        resumed = toy_trainer(out)
        sharded = any(hasattr(p, "full_tensor") for p in resumed._params.values())
        resumed.run()
        results[kind] = {"step": resumed.step, "sharded": sharded, "state": gathered(resumed)}
    torch.save(results, Path(folder) / f"{rank}.pt")
    dist.barrier()  # gloo may abort a process that leaves while the other is still talking
    dist.destroy_process_group()
