"""What each process of test_bsa_distributed.py does: every case once, on a mesh of two ranks and one of three."""

import os
import traceback
from collections.abc import Callable
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from bsa_distributed_cases import CASES, ONE_RANK_CASE, RULES, SELECTION_CASE, TRITON_CASE, Case, few_values
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from lcv_bsa import BlockSelection
from lcv_bsa.distributed import (
    Shard,
    gather,
    ring_attention,
    scatter,
    select_blocks_sharded,
    ulysses_attention,
)
from lcv_bsa.testing import run_with_gradients

# Two meshes of two ranks side by side, so that ranks of a mesh differ from global ranks; then one of three.
NUM_PROCESSES = 4
TIMEOUT_S = 25


def run_ring(case: Case, mesh: DeviceMesh) -> list[Tensor]:
    """This rank's o, lse, dq, dk, dv."""
    shard_q, shard_k = case.shards(mesh.size())
    q, k, v, do, dlse = cut_all(case, mesh)
    sel = rows_of(case.selection(), shard_q, mesh)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return ring_attention(q, k, v, sel, shard_k, mesh, backend=case.backend, return_lse=True)

    return list(run_with_gradients(attend, q, k, v, do, dlse))


def run_ulysses(case: Case, mesh: DeviceMesh) -> list[Tensor]:
    """This rank's o, lse, dq, dk, dv."""
    shard_q, shard_k = case.shards(mesh.size())

    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return ulysses_attention(q, k, v, case.selection(), shard_q, mesh, shard_k=shard_k, return_lse=True)

    return list(run_with_gradients(attend, *cut_all(case, mesh)))


def run_selection(case: Case, mesh: DeviceMesh, tied: bool, rule: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """This rank's indices and counts."""
    shard_q, shard_k = case.shards(mesh.size())
    q, k, *_ = (few_values(x) if tied else x for x in cut_all(case, mesh))
    sel = select_blocks_sharded(q, k, shard_q, shard_k, mesh, **rule)
    return sel.indices, sel.counts


def run_whole(case: Case, mesh: DeviceMesh) -> list[list[Tensor]]:
    """Whole tensors in, whole o out by each of the two ways, and their gradients: zero outside this rank's slabs."""
    shard_q, shard_k = case.shards(mesh.size())
    q, k, v, do, _ = (x.requires_grad_() for x in case.tensors())
    shards = ((q, shard_q), (k, shard_k), (v, shard_k))

    def by_ring(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        sel = select_blocks_sharded(q, k, shard_q, shard_k, mesh, keep=0.5)
        return ring_attention(q, k, v, sel, shard_k, mesh)

    def by_ulysses(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ulysses_attention(q, k, v, None, shard_q, mesh, shard_k=shard_k, keep=0.5)

    found = []
    for attend in (by_ring, by_ulysses):
        o = gather(attend(*(scatter(x, shard, mesh) for x, shard in shards)), shard_q, mesh)
        found.append([o.detach(), *torch.autograd.grad(o, (q, k, v), do.detach())])
    return found


def run_gather_of_vectors(case: Case, mesh: DeviceMesh) -> Tensor:
    """[B, H, S] there and back, as lse has it."""
    shard = case.shards(mesh.size())[0]
    return gather(scatter(case.tensors()[4], shard, mesh), shard, mesh)


def run_errors(case: Case, mesh: DeviceMesh, others: dict[str, DeviceMesh]) -> dict[str, str]:
    """The text of each ValueError; all are raised before anything is sent."""
    shard_q, shard_k = case.shards(mesh.size())
    q, k, v, *_ = cut_all(case, mesh)
    sel, n = rows_of(case.selection(), shard_q, mesh), mesh.size()
    longer = torch.cat((k, k), 2)
    other = Shard(case.grid_k, case.block_k, n - 1, case.axis_k)
    calls: dict[str, Callable[[], object]] = {
        "another size": lambda: ring_attention(q, k, v, sel, other, mesh),
        "two dimensions": lambda: ring_attention(q, k, v, sel, shard_k, others["square"]),
        "not in the mesh": lambda: scatter(k, Shard(case.grid_k, case.block_k, 1), others["one"]),
        "tokens of k": lambda: ring_attention(q, longer, longer, sel, shard_k, mesh),
        "tokens to select": lambda: select_blocks_sharded(q, longer, shard_q, shard_k, mesh, top_k=1),
        "v unlike k": lambda: ring_attention(q, k, v[..., :4], sel, shard_k, mesh),
        "whole selection": lambda: ring_attention(q, k, v, case.selection(), shard_k, mesh),
        "local selection": lambda: ulysses_attention(q, k, v, sel, shard_q, mesh, shard_k=shard_k),
        "heads of selection": lambda: ring_attention(q[:, :3], k[:, :1], v[:, :1], sel, shard_k, mesh),
        "reference": lambda: ring_attention(q, k, v, sel, shard_k, mesh, backend="reference"),
        "no such backend": lambda: ring_attention(q, k, v, sel, shard_k, mesh, backend="fast"),
        "scale": lambda: ring_attention(q, k, v, sel, shard_k, mesh, scale=0.0),
        "heads": lambda: ulysses_attention(q[:, :1], k[:, :1], v[:, :1], None, shard_q, mesh, shard_k=shard_k, keep=1),
        "no rule": lambda: ulysses_attention(q, k, v, None, shard_q, mesh, shard_k=shard_k),
        "rule and selection": lambda: ulysses_attention(q, k, v, sel, shard_q, mesh, shard_k=shard_k, top_k=1),
        "scattered twice": lambda: scatter(scatter(k, shard_k, mesh), shard_k, mesh),
        "gathered twice": lambda: gather(case.tensors()[1], shard_k, mesh),
    }
    return {name: message_of(call) for name, call in calls.items()}


def message_of(call: Callable[[], object]) -> str:
    """The text of the ValueError that `call` raises, else a text that no test expects."""
    try:
        call()
    except ValueError as error:
        return str(error)
    return "no error"


def cut_all(case: Case, mesh: DeviceMesh) -> list[Tensor]:
    """This rank's slabs of q, k, v, do, dlse."""
    shard_q, shard_k = case.shards(mesh.size())
    rank = mesh.get_local_rank()
    return [shard.cut(x, rank) for x, shard in zip(case.tensors(), (shard_q, shard_k, shard_k, shard_q, shard_q))]


def rows_of(sel: BlockSelection, shard_q: Shard, mesh: DeviceMesh) -> BlockSelection:
    """This rank's query blocks of a selection of the whole grid."""
    rank = mesh.get_local_rank()
    indices, counts = (shard_q.of_blocks.cut(x, rank) for x in (sel.indices, sel.counts))
    return BlockSelection(
        indices, counts, shard_q.local(rank).grid, sel.grid_k, sel.block_q, sel.block_k, uniform=sel.uniform
    )


def jobs(mesh: DeviceMesh, others: dict[str, DeviceMesh]) -> dict[str, Callable[[], Any]]:
    """Everything to run on one mesh, by name."""
    found: dict[str, Callable[[], Any]] = {}
    for name, case in CASES.items():
        if mesh.size() == 1 and name != ONE_RANK_CASE:
            continue
        found[f"ring, {name}"] = lambda case=case: run_ring(case, mesh)
        found[f"ulysses, {name}"] = lambda case=case: run_ulysses(case, mesh)
    if mesh.size() == 1:
        return found
    for name, rule in RULES.items():
        for values in ("real", "tied"):
            tied = values == "tied"
            found[f"select, {name}, {values}"] = lambda r=rule, t=tied: run_selection(SELECTION_CASE, mesh, t, r)
    if mesh.size() == 3 and find_spec("triton"):
        found["ring, triton"] = lambda: run_ring(TRITON_CASE, mesh)
    found["whole"] = lambda: run_whole(CASES["condition keys"], mesh)
    found["vectors"] = lambda: run_gather_of_vectors(CASES["uneven, partial, gqa"], mesh)
    found["errors"] = lambda: run_errors(CASES["uneven, partial, gqa"], mesh, others)
    return found


def main(rank: int, folder: str) -> None:
    """Writes {(ranks of the mesh, name): result} to folder/rank.pt; after a failure its traceback, and no more."""
    torch.set_num_threads(1)
    # before Triton is imported: these processes stay on the CPU, whatever the machine has
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = f"file://{Path(folder) / 'store'}"
    dist.init_process_group(
        "gloo", init_method=store, rank=rank, world_size=NUM_PROCESSES, timeout=timedelta(seconds=TIMEOUT_S)
    )
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp"))
    one, three = (DeviceMesh("cpu", list(range(n)), mesh_dim_names=("cp",)) for n in (1, 3))
    results: dict[tuple[int, str], Any] = {}
    for mesh in (one, square["cp"], three):
        if mesh.get_coordinate() is not None and not run_jobs(mesh, {"one": one, "square": square}, results):
            break
    torch.save(results, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def run_jobs(mesh: DeviceMesh, others: dict[str, DeviceMesh], results: dict[tuple[int, str], Any]) -> bool:
    """Whether all went well. The first failure is the last job: the others would wait for ranks that have left."""
    for name, job in jobs(mesh, others).items():
        try:
            results[mesh.size(), name] = job()
        except Exception:
            results[mesh.size(), name] = traceback.format_exc()
            return False
    return True
