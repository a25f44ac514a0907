"""Reading pieces of a weights file that was opened earlier and may have changed since.

Pieces are read into memory of ours and never mapped: a mapped file that is cut short kills the process.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from lcv_core.errors import CheckpointError


class Stamp(NamedTuple):
    """What tells that a file is still the same, at the price of a system call."""

    size: int
    modified_ns: int

    @classmethod
    def of(cls, stat: os.stat_result) -> Stamp:
        return cls(stat.st_size, stat.st_mtime_ns)


def read_exactly(path: Path, stamp: Stamp, start: int, target: memoryview) -> None:
    """Fill `target` with the bytes from `start` on.

    CheckpointError where the file is gone, is another than when the stamp was taken, or the disk fails.
    """
    try:
        with path.open("rb", buffering=0) as file:
            if Stamp.of(os.fstat(file.fileno())) != stamp:
                raise CheckpointError(
                    f"{path} changed while it was read; leave a model's files alone while it runs, and start again"
                )
            file.seek(start)
            done = 0
            while done < len(target):
                count = file.readinto(target[done:])
                if not count:
                    raise CheckpointError(f"{path} changed while it was read; download it again")
                done += count
    except FileNotFoundError:
        raise CheckpointError(f"{path} is gone; put it back and start again") from None
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read ({error.strerror or error}); check its disk, and start again"
        ) from None
