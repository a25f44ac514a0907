"""A page of a real browser on the ComfyUI that serves all tests."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest
import safetensors.torch
from comfyui.api import Client
from comfyui.fixtures import comfy, comfy_core
from playwright.sync_api import Page

from .browser import NO_CHROMIUM, alerts, console_errors, find_chromium, forget, open_page
from .timeline import THREE, Timeline, add_node, show

__all__ = ["comfy", "comfy_core"]

# Files of the Wan workflow. A front end marks loaders red whose file is not there.
MODELS = (
    "diffusion_models/wan2.1_t2v_1.3B_fp16.safetensors",
    "text_encoders/umt5_xxl_fp8_e4m3fn_scaled.safetensors",
    "vae/wan_2.1_vae.safetensors",
)


def furnish(comfy: Client) -> None:
    """What the run folder lacks of a user's: the example picture of every ComfyUI, and models (empty ones) by name."""
    folder = comfy.server.run
    shutil.copy(comfy.server.core.folder / "input" / "example.png", folder / "input")
    for name in MODELS:
        path = folder / "models" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        safetensors.torch.save_file({}, path)


# Of the package, not of the session: while Playwright is open, this thread can run no other event loop.
@pytest.fixture(scope="package")
def front_end(comfy: Client) -> Iterator[Page]:
    """The browser's page, as the test before left it."""
    if find_chromium() is None:
        pytest.skip(NO_CHROMIUM)
    furnish(comfy)
    with open_page(comfy.server.url) as page:
        yield page


@pytest.fixture
def page(front_end: Page) -> Page:
    """The front end with an empty graph and without errors."""
    forget(front_end)
    return front_end


@pytest.fixture
def clean(page: Page) -> Iterator[Page]:
    """An empty graph; nothing may be wrong at the end."""
    show(page)
    yield page
    assert console_errors(page) == []
    assert alerts(page) == []


@pytest.fixture
def timeline(clean: Page) -> Timeline:
    """A node with three prompts."""
    made = Timeline(clean, add_node(clean, prompts="\n".join(THREE)))
    made.must_have(*THREE)
    return made
