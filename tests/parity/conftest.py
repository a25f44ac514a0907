"""Fixtures of the parity tests."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from golden_vectors import golden, make_dit, make_vae
from torch import Tensor

from lcv_core.dit.model import LongCatDiT
from lcv_core.vae.model import WanVAE


@pytest.fixture
def dit() -> LongCatDiT:
    return make_dit()


@pytest.fixture
def vae() -> WanVAE:
    return make_vae()


@pytest.fixture
def cases() -> dict[str, Tensor]:
    return golden("dit_cases")


@pytest.fixture
def build_dit() -> Callable[..., LongCatDiT]:
    return make_dit
