"""How a run ends early."""

from __future__ import annotations


class Stopped(Exception):
    """The user pressed Ctrl-C; the message says what is kept.

    Not a KeyboardInterrupt: the command line library turns those into an exit code and drops the message.
    """
