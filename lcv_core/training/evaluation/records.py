"""Measurements of single cases on disk, one line each, so that an evaluation that was interrupted goes on."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lcv_core.files import write_error
from lcv_core.training.evaluation.cases import Case

Record = dict[str, Any]


class RecordFile:
    """The records of one kind of clips, by case number, in a file of JSON lines.

    key: `fingerprint` of what decides them; records of another key are dropped at the first new one.
    """

    def __init__(self, path: Path, key: str) -> None:
        self.path, self.key = path, key
        self.records: dict[int, Record] = {}
        self.replaced = False
        for record in _read(path):
            if record.get("key") == key:
                self.records[int(record["index"])] = record
            else:
                self.replaced = True
        self._fresh = not self.records

    def add(self, records: Sequence[Record]) -> None:
        """Append records; InputError when the disk does not take them."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            half = not self._fresh and not self.path.read_bytes().endswith(b"\n")  # a line of a killed run
            with self.path.open("w" if self._fresh else "a", encoding="utf-8", newline="\n") as file:
                file.write("\n" if half else "")
                for record in records:
                    self.records[record["index"]] = record = {"key": self.key, **record}
                    file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise write_error(self.path, error) from error
        self._fresh = False


def _read(path: Path) -> list[Record]:
    """The lines that are whole: a killed run may have left half of one."""
    if not path.is_file():
        return []
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and "index" in record:
            found.append(record)
    return found


def collect(
    file: RecordFile,
    cases: Sequence[Case],
    make: Callable[[list[Case]], list[Record]],
    *,
    batch: int,
    on_done: Callable[[int, int], None],
) -> list[Record]:
    """The records of the cases; those that are not in the file are made, `batch` at a time. on_done: (done, total)."""
    missing = [case for case in cases if case.index not in file.records]
    done = len(cases) - len(missing)
    on_done(done, len(cases))
    for start in range(0, len(missing), batch):
        part = missing[start : start + batch]
        file.add(make(part))
        done += len(part)
        on_done(done, len(cases))
    return [file.records[case.index] for case in cases]
