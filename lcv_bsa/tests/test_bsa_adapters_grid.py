"""The grid of a latent, and who may import whom."""

import ast
import sys
from pathlib import Path

import pytest

import lcv_bsa
from lcv_bsa.adapters.grid import grid_from_latent


def test_grid_from_latent() -> None:
    assert grid_from_latent((1, 16, 21, 60, 104), (1, 2, 2)) == (21, 30, 52)
    assert grid_from_latent((21, 61, 104), [1, 2, 2]) == (21, 31, 52)
    with pytest.raises(ValueError, match=r"shape must end in \(F, H, W\), got \(60, 104\)"):
        grid_from_latent((60, 104), (1, 2, 2))
    with pytest.raises(ValueError, match="patch_size must be three positive ints"):
        grid_from_latent((21, 60, 104), (2, 2))


def test_only_torch_is_imported_and_adapters_only_by_name() -> None:
    package = Path(lcv_bsa.__file__).parent
    adapters = {path: imports(path) for path in (package / "adapters").glob("*.py")}
    assert len(adapters) > 3
    for path, names in adapters.items():
        assert {name.split(".")[0] for name in names} <= {*sys.stdlib_module_names, "torch", "lcv_bsa"}, path
    for path in set(package.rglob("*.py")) - adapters.keys():
        assert not any(name.startswith("lcv_bsa.adapters") for name in imports(path)), path


def imports(path: Path) -> set[str]:
    """Modules named by the import statements of a file, at any depth."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return names | {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
