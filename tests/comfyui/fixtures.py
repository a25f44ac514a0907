"""Fixtures for every test that needs a real ComfyUI; a conftest imports them. One server serves the whole run."""

from __future__ import annotations

from pathlib import Path

import pytest

from .api import Client
from .server import ComfyServer, Core, Options, find_core

PACKS = tuple(Path(__file__).with_name("packs") / name for name in ("steps", "parts"))
SERVER = pytest.StashKey[ComfyServer]()
NO_COMFYUI = "no ComfyUI: `make check` gets one, `make .comfyui/installed` too, or set COMFYUI_DIR to a checkout"


@pytest.fixture(scope="session")
def comfy_core() -> Core:
    """The ComfyUI checkout; skips where there is none. For tests that start a server of their own."""
    core = find_core()
    if core is None:
        pytest.skip(NO_COMFYUI)
    return core


@pytest.fixture(scope="session")
def comfy(comfy_core: Core, pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Client:
    """A client of the one running ComfyUI. The pack is linked, not installed, with other packs beside it."""
    # In the stash, not in the fixture: a fixture imported by two conftests is two fixtures.
    if SERVER not in pytestconfig.stash:
        server = ComfyServer(comfy_core, tmp_path_factory.mktemp("comfyui"), Options(packs=PACKS))
        pytestconfig.stash[SERVER] = server
        pytestconfig.add_cleanup(server.stop)
    return Client(pytestconfig.stash[SERVER])
