"""The command `lcv`."""

from lcv_core.cli.main import main

__all__ = ["main"]
