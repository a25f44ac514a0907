"""The kernels compile for a GPU that is not here, without spills: `benchmarks/aot.py --gate` in its own process."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "aot.py"

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed; pip install triton to compile its kernels", allow_module_level=True)
if sys.platform != "linux":
    pytest.skip("triton's wheels carry ptxas for Linux alone", allow_module_level=True)


def aot(cache: Path, *arguments: str, interpret: bool = False) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache)} | ({"TRITON_INTERPRET": "1"} if interpret else {})
    return subprocess.run([sys.executable, SCRIPT, *arguments], env=environment, capture_output=True, text=True)


def test_the_gate_is_green_on_sm_90(tmp_path: Path) -> None:
    done = aot(tmp_path, "--arch", "sm_90", "--gate", "--csv", str(tmp_path / "aot.csv"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("gate: green\n")
    compiled = {line.split(",")[0] for line in (tmp_path / "aot.csv").read_text().splitlines()[1:]}
    assert compiled >= {"forward_kernel", "dq_kernel", "dkv_kernel", "means_kernel", "top_k_kernel", "fill_kernel"}


def test_the_gate_is_red_for_what_is_wrong(tmp_path: Path) -> None:
    """Three warps do not compile; a register limit far too low spills and serializes."""
    what = ["--arch", "sm_90", "--kernel", "forward_kernel", "--warps", "3", "4", "--maxnreg", "96"]
    done = aot(tmp_path, *what, "--gate")
    assert done.returncode == 1
    assert "gate: red" in done.stdout
    assert "forward_kernel on sm_90 {'num_warps': 3, 'maxnreg': 96}: does not compile" in done.stdout
    assert "forward_kernel on sm_90: spills must be <= 0, got" in done.stdout
    assert "forward_kernel on sm_90: ptxas serializes wgmma" in done.stdout


def test_the_gate_is_red_when_nothing_was_compiled(tmp_path: Path) -> None:
    done = aot(tmp_path, "--arch", "sm_90", "--kernel", "no_such_kernel", "--gate")
    assert done.returncode == 1
    assert "no kernel was compiled" in done.stdout


def test_it_refuses_the_interpreter(tmp_path: Path) -> None:
    done = aot(tmp_path, "--gate", interpret=True)
    assert done.returncode == 1
    assert "TRITON_INTERPRET is set" in done.stderr
