"""The wheel: what it holds, and that a copy installed from it works alone, outside the repository."""

import importlib.util
import re
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
if not README.is_file():
    pytest.skip("the sources are not here, so there is no wheel to build", allow_module_level=True)

UNREACHABLE = re.compile(
    r"No matching distribution found for hatchling|Failed to establish|Max retries|Name or service"
)

# Run by the installed copy; everything printed is asserted on. torch itself imports Triton at the first operator of
# another library that it calls, so that only the import of lcv_bsa can be held to leave Triton alone.
PROGRAM = """
import sys, torch, lcv_bsa
print(lcv_bsa.__file__, "triton" in sys.modules, sep="\\n")
from lcv_bsa import block_sparse_attention, bsa_3d, select_blocks
grid = (4, 6, 8)
q, k, v = (torch.randn(1, 2, 192, 16, requires_grad=True) for _ in range(3))
selection = select_blocks(q, k, grid, grid, top_k=2)
o, lse = block_sparse_attention(q, k, v, selection, return_lse=True)
(o.sum() + lse.sum()).backward()
same = o.shape == bsa_3d(q, k, v, grid, keep=None, top_k=2).shape == q.shape
print(same, q.grad.isfinite().all().item(), "lcv_bsa.backends.triton" in sys.modules, sep="\\n")
"""


def pip(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if importlib.util.find_spec("pip") is None:
        pytest.skip("pip is not installed here; the wheel is built by it")
    folder = tmp_path_factory.mktemp("wheel")
    isolation = ["--no-build-isolation"] if importlib.util.find_spec("hatchling") else []
    built = pip("wheel", str(ROOT), "--no-deps", "--wheel-dir", str(folder), *isolation)
    if built.returncode != 0 and not isolation and UNREACHABLE.search(built.stderr):
        pytest.skip("hatchling is neither installed nor to be had from an index; pip install hatchling")
    assert built.returncode == 0, built.stderr
    (only,) = folder.glob("*.whl")
    return only


def test_contents(wheel: Path) -> None:
    """The package with its marker for type checkers, licence and README; no tests, no benchmarks."""
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (info,) = {name.split("/")[0] for name in names if not name.startswith("lcv_bsa/")}
        metadata = archive.read(f"{info}/METADATA").decode()
    assert re.fullmatch(r"lcv_bsa-[\d.]+\.dist-info", info)
    sources = {f"lcv_bsa/{path.relative_to(ROOT / 'src' / 'lcv_bsa').as_posix()}" for path in
               (ROOT / "src" / "lcv_bsa").rglob("*.py")}  # fmt: skip
    assert {name for name in names if name.startswith("lcv_bsa/")} == sources | {"lcv_bsa/py.typed"}
    assert f"{info}/licenses/LICENSE" in names
    assert README.read_text(encoding="utf-8").strip() in metadata
    required = re.findall(r"^Requires-Dist: (.+)$", metadata, re.MULTILINE)
    assert [name for name in required if "extra ==" not in name] == ["torch>=2.8"]


def test_installed_copy_works_alone(wheel: Path, tmp_path: Path) -> None:
    """In an empty environment that sees this one's torch, and Triton, which it must leave alone."""
    home = tmp_path / "venv"
    venv.create(home, with_pip=False, symlinks=sys.platform != "win32")
    python = home / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    installed = pip("--python", str(python), "install", "--no-deps", "--no-index", str(wheel))
    assert installed.returncode == 0, installed.stderr
    (site,) = [path.parent for path in home.rglob("lcv_bsa") if path.is_dir()]
    # a path file of a path file is not followed, so an editable lcv_bsa of the other environment stays out of sight
    (site / "torch_is_there.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
    done = subprocess.run([str(python), "-I", "-c", PROGRAM], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    file, triton_imported, same, finite, kernels_imported = done.stdout.split()
    assert Path(file).is_relative_to(home)
    assert (same, finite, kernels_imported) == ("True", "True", "False"), done.stdout
    assert triton_imported == "False"


def blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def test_readme_runs() -> None:
    """Its Python blocks from top to bottom, as one program; those that need a host or eight GPUs are only compiled."""
    assert len(blocks()) >= 2
    names: dict[str, object] = {}
    for number, block in enumerate(blocks()):
        code = compile(block, f"README.md, block {number}", "exec")
        if not re.search(r"lcv_bsa\.(adapters|distributed)|sparse_override", block):
            exec(code, names)


def test_readme_names_every_backend() -> None:
    from lcv_bsa.backends import _LOADERS

    text = README.read_text(encoding="utf-8")
    assert not [name for name in _LOADERS if f'`"{name}"`' not in text]
