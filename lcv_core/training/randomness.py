"""Random numbers by address: the same seed and place give the same draw, whatever was drawn before or elsewhere."""

from __future__ import annotations

import hashlib

import torch


def seed_of(*address: int | str) -> int:
    """63 bits that depend on every part of an address such as (seed, "noise", step, micro, index)."""
    digest = hashlib.sha256("/".join(map(str, address)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator(*address: int | str) -> torch.Generator:
    """A CPU generator seeded with `seed_of(*address)`."""
    return torch.Generator().manual_seed(seed_of(*address))
