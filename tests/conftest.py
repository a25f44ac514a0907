"""What all tests share."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from lcv_core.weights.init import init_checkpoint

# The models are tiny: more threads cost more than they bring, and a busy machine would stall them.
torch.set_num_threads(1)
# Without a GPU Triton's kernels run in its interpreter, which has to be asked for before triton is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# A shell's background jobs are deaf to Ctrl-C, and so is what they start; some tests press it.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
settings.register_profile("project", deadline=None, max_examples=50)
settings.load_profile("project")


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random tiny model in the official layout; read only."""
    return init_checkpoint(tmp_path_factory.mktemp("models") / "tiny", "tiny")
