"""What is handed out: the wheel, the source archive, requirements.txt, and what ComfyUI's registry reads."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pathspec
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT, COMFY = PYPROJECT["project"], PYPROJECT["tool"]["comfy"]
PACK_FOLDERS = ("comfy_nodes", "lcv_core", "lcv_bsa/src", "locales", "workflows")
PACK_FILES = ("__init__.py", "requirements.txt", "README.md", "LICENSE")
# Of the oldest ComfyUI that is supported, 0.3.64: what its requirements.txt installs, and the front end it starts.
COMFYUI_INSTALLS = {
    "torch", "torchsde", "torchvision", "torchaudio", "numpy", "einops", "transformers", "tokenizers", "sentencepiece",
    "safetensors", "aiohttp", "yarl", "pyyaml", "pillow", "scipy", "tqdm", "psutil", "alembic", "sqlalchemy", "av",
    "kornia", "spandrel", "pydantic", "pydantic-settings",
}  # fmt: skip
COMFYUI_FRONTEND = "1.27.10"
COMFYUI_MODULES = {"comfy", "comfy_api", "folder_paths", "latent_preview", "nodes", "server"}
MODULE_OF = {"pillow": "PIL", "pyyaml": "yaml"}
# Imported where it is used; its absence is a message that says what to install.
OPTIONAL = {"gguf", "triton"}
OTHER_HOSTS = {"diffusers"}  # of lcv_bsa's adapters, each imported by its own alone


def build(kind: str, folder: Path) -> Path:
    """The wheel or the sdist, made by the build backend as pip calls it."""
    if importlib.util.find_spec("hatchling") is None:
        pytest.skip("hatchling is not installed; it comes with the dev extra")
    program = f"import hatchling.build, sys; print(hatchling.build.build_{kind}(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", program, str(folder)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / done.stdout.split()[-1]


def files_of(*folders: str) -> set[str]:
    """Every file below these folders, as paths from the root; no caches."""
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]
    return {path.relative_to(ROOT).as_posix() for path in paths if "__pycache__" not in path.parts}


def requirements(lines: list[str]) -> dict[str, Requirement]:
    found = [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]
    return {canonicalize_name(requirement.name): requirement for requirement in found}


DECLARED = requirements(PROJECT["dependencies"])
FOR_COMFYUI = requirements((ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines())


def test_wheel_holds_both_packages_and_the_front_end_files(tmp_path: Path) -> None:
    with zipfile.ZipFile(build("wheel", tmp_path)) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert held == files_of("lcv_core", "comfy_nodes")
    assert {"comfy_nodes/__init__.py", "lcv_core/__init__.py"} <= held
    assert {Path(name).suffix for name in held if name.startswith("comfy_nodes/web/")} >= {".js", ".css"}


def test_sdist_is_the_whole_node_pack(tmp_path: Path) -> None:
    with tarfile.open(build("sdist", tmp_path)) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    added = {"PKG-INFO", "pyproject.toml", ".gitignore"}
    of_bsa = {f"lcv_bsa/{name}" for name in ("pyproject.toml", "README.md", "LICENSE")}
    assert held == files_of(*PACK_FOLDERS) | {*PACK_FILES} | of_bsa | added
    assert {"workflows/first_run.json", "workflows/first_run.jpg", "locales/zh/nodeDefs.json"} <= held


def test_registry_archive_leaves_out_nothing_that_is_needed() -> None:
    ignored = pathspec.PathSpec.from_lines(
        "gitignore", (ROOT / ".comfyignore").read_text(encoding="utf-8").splitlines()
    )
    needed = files_of(*PACK_FOLDERS) | {*PACK_FILES, "pyproject.toml", COMFY["Icon"], COMFY["Banner"]}
    assert not [name for name in needed if ignored.match_file(name)]
    tests = files_of("tests", "benchmarks", "lcv_bsa/tests")
    assert len(tests) > 50
    assert not [name for name in tests if not ignored.match_file(name)]


def test_requirements_leave_comfyuis_packages_alone() -> None:
    """Above all torch: pip would replace a CUDA build by another."""
    assert FOR_COMFYUI
    assert not set(FOR_COMFYUI) & (COMFYUI_INSTALLS | {"triton", "comfyui-frontend-package"})
    assert not [name for name in FOR_COMFYUI if name.startswith("nvidia")]


def test_both_lists_have_the_same_lower_bounds() -> None:
    assert {name: DECLARED[name].specifier for name in FOR_COMFYUI} == {
        name: requirement.specifier for name, requirement in FOR_COMFYUI.items()
    }
    assert not [name for name, found in DECLARED.items() if [part.operator for part in found.specifier] != [">="]]


def imports(file: Path) -> Iterator[str]:
    """First names of the modules that a file imports, anywhere in it; relative imports are left out."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.partition(".")[0]


def test_nodes_import_only_what_comfyui_or_requirements_install() -> None:
    """The command line and training have packages of their own, which nobody installs for ComfyUI."""
    files = [ROOT / name for name in files_of("comfy_nodes", "lcv_core", "lcv_bsa/src") if name.endswith(".py")]
    files = [file for file in files if not {"cli", "training", "__main__.py"} & set(file.parts)]
    installed = {MODULE_OF.get(name, name) for name in COMFYUI_INSTALLS | set(FOR_COMFYUI)}
    known = installed | OPTIONAL | OTHER_HOSTS | COMFYUI_MODULES | {"lcv_core", "lcv_bsa"} | sys.stdlib_module_names
    assert {name: file.relative_to(ROOT) for file in files for name in imports(file) if name not in known} == {}
    assert "torch" in {name for file in files for name in imports(file)}


def test_the_registry_can_read_the_project() -> None:
    assert re.fullmatch(r"[a-z][a-z0-9]*([-_.][a-z0-9]+)*", PROJECT["name"])
    assert "comfyui" not in PROJECT["name"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", PROJECT["version"])
    assert PROJECT["description"]
    assert PROJECT["license"] == "MIT"
    assert PROJECT["requires-python"].startswith(">=")
    assert "Operating System :: OS Independent" in PROJECT["classifiers"]
    assert re.fullmatch(r"[a-z0-9-]+", COMFY["PublisherId"])
    assert COMFY["DisplayName"] == "LongCat-Video"


def test_the_lowest_comfyui_and_front_end_are_declared() -> None:
    assert COMFY["requires-comfyui"] == ">=0.3.64"
    assert str(DECLARED["comfyui-frontend-package"].specifier) == f">={COMFYUI_FRONTEND}"


@pytest.mark.parametrize(("picture", "size"), (("Icon", (400, 400)), ("Banner", (1344, 576))))
def test_pictures_are_what_the_registry_takes(picture: str, size: tuple[int, int]) -> None:
    """A square of at most 400 pixels and 21:9, light, each beside the drawing that it was made from."""
    file = ROOT / COMFY[picture]
    with Image.open(file) as image:
        assert (image.format, image.size) == ("PNG", size)
    assert file.stat().st_size < 60_000
    assert file.with_suffix(".svg").is_file()
