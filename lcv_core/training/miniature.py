"""From the runs of the `mini/*` recipes to the miniature that the package carries.

    python -m lcv_core.training.miniature outputs/mini

takes each part from the run that made it, and the runs' metrics and curves to docs/miniature/training.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from lcv_core.errors import InputError
from lcv_core.files import replace_folder, temporary_path
from lcv_core.miniature import miniature

MOST_BYTES = 40_000_000  # of all files together: it lies in git
RUNS = (
    "text", "vae", "flow", "refine_dense", "refine_sparse", "refine_more", "vae_fine", "refine_short", "refine_whole",
    "cfg_distill", "step_distill", "grpo",
)  # fmt: skip
_BASE = ("dit", "text_encoder", "tokenizer", "scheduler", "model_index.json")
PARTS = {**dict.fromkeys(_BASE, "flow"), "vae": "vae_fine"}  # by the run that made them
ADAPTERS = {"refine_whole": "refinement_lora", "step_distill": "cfg_step_lora", "grpo": "grpo_lora"}
_RECORDS = {"metrics.csv": "{run}.csv", "curves.png": "{run}.png"}


def assemble(runs: Path, target: Path) -> Path:
    """Put the miniature together in `target`, which it replaces. InputError names the run that is not finished."""
    sources = {part: _made(runs / run / "model" / part) for part, run in PARTS.items()}
    for run, name in ADAPTERS.items():
        file = f"lora/{name}.safetensors"
        sources[file] = _made(runs / run / "model" / file)
    size = sum(file.stat().st_size for source in sources.values() for file in _files(source))
    if size > MOST_BYTES:
        raise InputError(f"the miniature takes {size / 1e6:.1f} MB, more than the {MOST_BYTES / 1e6:.0f} MB it may")
    partial = temporary_path(target)
    try:
        for name, source in sources.items():
            for file in _files(source):
                place = partial / name if source.is_file() else partial / name / file.relative_to(source)
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, place)
        replace_folder(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def keep_records(runs: Path, folder: Path) -> None:
    """The metrics and curves of every run to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for run in RUNS:
        for name, kept in _RECORDS.items():
            shutil.copyfile(_made(runs / run / name), folder / kept.format(run=run))


def _made(path: Path) -> Path:
    if not path.exists():
        raise InputError(f"{path} is not there; finish that run first: make mini")
    return path


def _files(source: Path) -> list[Path]:
    return [source] if source.is_file() else sorted(path for path in source.rglob("*") if path.is_file())


def main() -> None:
    """The command above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="folder of the runs")
    parser.add_argument("--target", type=Path, default=miniature(), help="default: the one of this package")
    parser.add_argument("--records", type=Path, default=Path("docs/miniature/training"))
    options = parser.parse_args()
    try:
        folder = assemble(options.runs, options.target)
        keep_records(options.runs, options.records)
    except InputError as error:
        sys.exit(f"miniature: {error}")
    size = sum(file.stat().st_size for file in _files(folder))
    sys.stdout.write(f"wrote {folder}, {size / 1e6:.1f} MB\n")


if __name__ == "__main__":
    main()
