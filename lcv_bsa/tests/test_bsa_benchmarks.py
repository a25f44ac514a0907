"""The benchmark scripts: they run to the end, the gate turns red, and peers get and give what they should."""

import csv
import importlib
import json
import os
import subprocess
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from lcv_bsa import BlockLayout, BlockSelection, reference_attention
from lcv_bsa.layout import from_blocks, to_blocks

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
if not BENCHMARKS.is_dir():
    pytest.skip("the benchmarks are not part of this installation", allow_module_level=True)

MODULES = ("gpu_hour", "inputs", "measure", "parts", "peers", "report", "rows", "run", "shapes", "targets", "verify")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[types.SimpleNamespace]:
    """The scripts as modules. Their plain names are taken back afterwards: other folders use some of them too."""
    before = {name: sys.modules.pop(name, None) for name in MODULES}
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield types.SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})
    for name, module in before.items():
        sys.modules.pop(name, None)
        if module is not None:
            sys.modules[name] = module


@pytest.fixture
def problem(bench: types.SimpleNamespace) -> Any:
    return bench.peers.Problem(bench.shapes.SHAPES["tiny"], torch.float32, torch.device("cpu"), 0.25)


def run_script(name: str, *arguments: str) -> str:
    command = [sys.executable, str(BENCHMARKS / name), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_run_appends_rows(tmp_path: Path) -> None:
    out = tmp_path / "rows.csv"
    options = ["--device", "cpu", "--shapes", "tiny_partial", "--backends", "cpu", "--peers", "dense,fa3"]
    printed = run_script("run.py", *options, "--repeats", "1", "--out", str(out))
    rows = list(csv.DictReader(out.open()))
    by_part = {(row["backend"], row["part"]): row for row in rows}
    assert {part for backend, part in by_part if backend == "cpu"} == {
        "gate", "selection", "forward", "backward", "forward+backward", "total", "total+backward",
    }  # fmt: skip
    assert by_part["fa3", "gate"]["status"] == "absent: needs a GPU"
    assert all(float(row["ms"]) > 0 for row in rows if row["status"] == "ok")
    assert "total+backward: cpu" in printed  # its speed against dense


def test_gpu_hour_runs_a_stage_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    """One item is done already, another was cut off in the middle."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed; pip install triton to run its kernels")
    notes = [
        {"item": "inverse torch 480p", "state": "done", "rows": []},
        {"item": "inverse torch 720p", "state": "started"},
    ]
    text = "".join(json.dumps(note | {"time": time.time()}) + "\n" for note in notes)
    (tmp_path / "stage_4.jsonl").write_text(text)
    printed = run_script("gpu_hour.py", "--tiny", "--stage", "4", "--out", str(tmp_path))
    assert "16 done, 0 failed, 0 skipped" in printed
    rows = list(csv.DictReader((tmp_path / "rows.csv").open()))
    assert len(rows) == 15 and "inverse torch 720p" in {row["item"] for row in rows}
    assert len(json.loads((tmp_path / "summary.json").read_text())["rows"]) == 15


@pytest.mark.parametrize("end", ["os._exit(9)", "time.sleep(99)"])
def test_gpu_hour_passes_over_what_kills_it(tmp_path: Path, bench: types.SimpleNamespace, end: str) -> None:
    """The child dies or hangs in its second item; the next child takes up after it."""
    hour = bench.gpu_hour
    child = tmp_path / "child.py"
    child.write_text(
        "import json, os, pathlib, sys, time\n"
        "path = pathlib.Path(sys.argv[sys.argv.index('--out') + 1]) / 'stage_1.jsonl'\n"
        "def note(item, state): path.open('a').write(json.dumps({'item': item, 'state': state, 'time': 0}) + '\\n')\n"
        "if path.exists():\n    note('c', 'done'); sys.exit(0)\n"
        f"note('a', 'done'); note('b', 'started'); {end}\n"
    )
    hour.__file__ = str(child)
    args = hour.parse(["--out", str(tmp_path), "--budget", "60"])
    hour.run_stage(args, 1, ["--out", str(tmp_path)])
    notes = hour.Store(tmp_path, 1).notes()
    assert {item: note["state"] for item, note in notes.items()} == {"a": "done", "b": "failed", "c": "done"}
    assert "the process ended here" in notes["b"]["why"]


def test_kept_pairs_counts_tokens(bench: types.SimpleNamespace) -> None:
    """By brute force over tokens; partial blocks and rows of different length."""
    shape = bench.shapes.SHAPES["tiny_partial"]
    generator = torch.Generator().manual_seed(0)
    selection = bench.verify.random_selection(shape.grid, generator=generator, heads=2)
    from lcv_bsa.reference import token_mask

    assert bench.shapes.kept_pairs(selection) == int(token_mask(selection).sum())
    assert bench.shapes.flops(10, 64, "forward+backward") == bench.shapes.flops(10, 64, "forward") + bench.shapes.flops(
        10, 64, "backward"
    )


def test_the_gate_turns_red(bench: types.SimpleNamespace, problem: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = bench.inputs.Inputs.of(problem)
    assert bench.verify.gate("cpu", problem, inputs, {}).startswith("ok")
    right = bench.peers.block_sparse_attention

    def slightly_wrong(q: torch.Tensor, *rest: Any, **options: Any) -> Any:
        return right(q * 1.001, *rest, **options)

    monkeypatch.setattr(bench.peers, "block_sparse_attention", slightly_wrong)
    assert bench.verify.gate("cpu", problem, inputs, {}).startswith("wrong: ")


def test_no_speedup_without_a_green_gate(bench: types.SimpleNamespace) -> None:
    row = {"shape": "s", "dtype": "fp32", "sparsity": "0.9", "part": "total", "status": "ok"}
    dense, fast = row | {"backend": "dense", "ms": "10"}, row | {"backend": "cpu", "ms": "2"}
    red = row | {"backend": "triton", "ms": "1", "status": "wrong: o 1 > 1e-05"}
    (only,) = bench.rows.speedups([dense, fast, red], "total")
    assert "cpu 5.00x dense" in only


def test_targets(bench: types.SimpleNamespace) -> None:
    def row(backend: str, part: str, ms: float, tflops: float = 0.0) -> dict[str, str]:
        return {"shape": "720p", "backend": backend, "part": part, "ms": str(ms), "tflops": str(tflops), "status": "ok"}

    rows = [row("triton", "forward", 50, 600), row("triton", "total", 60), row("triton_int8", "total", 1)]
    rows += [row("dense_cudnn", "total", 700), row("dense", "total", 900), row("official", "total", 150)]
    verdicts = bench.targets.targets(rows, "720p", "480p")
    assert verdicts[0].startswith("met") and "600" in verdicts[0]
    assert verdicts[1].startswith("unknown")  # no backward was timed
    assert verdicts[2].startswith("met") and "2.50x, triton against official" in verdicts[2]
    assert verdicts[4].startswith("unknown") and "vsa" in verdicts[4]
    assert verdicts[6].startswith("NOT MET") and "11.67x" in verdicts[6]


# Stand-ins for the peers, each in the layout and with the signature of the real one.


def over_blocks(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, indices: torch.Tensor, shape: Any) -> Any:
    """Attention of packed [B, H, N * n, D] tensors by the reference, o packed and lse in the packed order."""
    layout: BlockLayout = shape.layout
    selection = BlockSelection.from_indices(
        indices.sort(-1).values, grid_q=shape.grid, grid_k=shape.grid, block_q=shape.block
    )
    unpacked = [from_blocks(x.unflatten(2, (layout.num_blocks, -1)), layout) for x in (q, k, v)]
    o, lse = reference_attention(*unpacked, selection)
    return to_blocks(o, layout).flatten(2, 3), to_blocks(lse[..., None], layout).flatten(2)


def fa3(shape: Any) -> types.ModuleType:
    module = types.ModuleType("flash_attn_interface")

    def flash_attn_func(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, None]:
        assert q.shape[2] == shape.heads  # [B, S, H, D]
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2), None

    module.flash_attn_func = flash_attn_func  # type: ignore[attr-defined]
    return module


def vsa(shape: Any, *, by_index: bool) -> types.ModuleType:
    module = types.ModuleType("fastvideo_kernel")

    def from_indices(q: Any, k: Any, v: Any, indices: Any, counts: Any, sizes: Any) -> Any:
        assert (counts == indices.shape[-1]).all() and sizes.sum() == shape.layout.num_tokens
        return over_blocks(q, k, v, indices, shape)

    def from_mask(q: Any, k: Any, v: Any, mask: Any, sizes: Any) -> Any:
        kept = int(mask[0, 0, 0].sum())
        return over_blocks(q, k, v, mask.int().topk(kept, -1).indices, shape)

    module.block_sparse_attn = from_mask  # type: ignore[attr-defined]
    if by_index:
        module.block_sparse_attn_from_indices = from_indices  # type: ignore[attr-defined]
    return module


def official(shape: Any) -> types.ModuleType:
    module = types.ModuleType("bsa_interface")

    def forward(q: Any, k: Any, v: Any, scale: float, indices: Any, counts: Any, nq: int, nk: int, sparsity: float):
        assert (nq, nk, scale) == (64, 64, shape.head_dim**-0.5) and sparsity == pytest.approx(0.75)
        return over_blocks(q, k, v, indices, shape)

    def backward(
        do: Any, q: Any, k: Any, v: Any, o: Any, dq: Any, dk: Any, dv: Any, scale: Any, lse: Any, indices: Any, *_: Any
    ):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        with torch.enable_grad():
            grads = torch.autograd.grad(over_blocks(*leaves, indices, shape)[0], leaves, do)
        for out, grad in zip((dq, dk, dv), grads):
            out.copy_(grad)

    def choose(q: torch.Tensor, k: torch.Tensor, sparsity: float, cdf: None) -> tuple[torch.Tensor, torch.Tensor]:
        scores = q @ k.mT
        kept = int((1 - sparsity) * scores.shape[-1])
        return scores.topk(kept, -1).indices, torch.full(scores.shape[:3], kept, dtype=torch.int32)

    module.attn_fwd_bsa_varlen_triton = forward  # type: ignore[attr-defined]
    module.attn_bwd_bsa_varlen_triton = backward  # type: ignore[attr-defined]
    module.mean_pooling_compression = lambda x, n: x.unflatten(2, (-1, n)).mean(3)  # type: ignore[attr-defined]
    module.get_select_indices = choose  # type: ignore[attr-defined]
    return module


@pytest.mark.parametrize("peer", ["fa3", "vsa", "vsa by mask", "official"])
def test_peers_are_given_what_they_read(
    bench: types.SimpleNamespace, problem: Any, monkeypatch: pytest.MonkeyPatch, peer: str
) -> None:
    """The gate is green, and all parts run; the stand-in computes on what the glue hands it."""
    name = peer.split()[0]

    def imported(module: str, hint: str) -> types.ModuleType:
        return {"fa3": fa3, "official": official}[name](shape) if name != "vsa" else vsa(shape, by_index=peer == "vsa")

    monkeypatch.setattr(bench.peers, "_needs_gpu", lambda problem: None)
    monkeypatch.setattr(bench.peers, "_import", imported)
    shape = next(bench.verify._small(problem)).shape
    assert bench.verify.gate(name, problem, bench.inputs.Inputs.of(problem), {}).startswith("ok")
    shape = problem.shape
    made = bench.peers.contender(name, problem, {})
    inputs = bench.inputs.Inputs.of(problem)
    limits = bench.measure.Limits(1, 0.1)
    results = dict(bench.parts.time_parts(made, problem, inputs, bench.parts.PARTS, limits))
    sparse = {"selection", "layout"} if name != "fa3" else set()
    assert set(results) == sparse | {"forward", "backward", "forward+backward", "total", "total+backward"}
    assert not [result for result in results.values() if isinstance(result, str)]


def test_absent_peers_say_why(bench: types.SimpleNamespace, problem: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = bench.inputs.Inputs.of(problem)
    assert bench.verify.gate("fa3", problem, inputs, {}) == "absent: needs a GPU"
    assert bench.verify.gate("fa3", problem, inputs, {"fa3": "/nowhere"}) == "absent: no such path: /nowhere"
    monkeypatch.setattr(bench.peers, "_needs_gpu", lambda problem: None)
    assert "--peer official=FOLDER" in bench.verify.gate("official", problem, inputs, {})
    assert bench.verify.gate("no_backend", problem, inputs, {}) == "absent: no backend has this name"
