"""Put a Chromium into `.comfyui/chromium` for the tests of this folder: chromium, al2023/lib, fonts/.

Where one is installed or CHROMIUM names one, that one serves and nothing is fetched. Else the program comes out of an
npm package that carries it, so that nothing but a package index has to be reached. Without npm the browser tests skip.
"""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[2] / ".comfyui" / "chromium"
CARRIER = "@sparticuz/chromium@153.0.0"
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
UNPACK = "process.stdin.pipe(require('zlib').createBrotliDecompress()).pipe(process.stdout)"
# Of the package's parts: libraries and fonts that a bare machine lacks.
ARCHIVES = ("al2023", "fonts")
# The package's own names folders of the place it was made for.
FONTS = """<?xml version="1.0"?>
<!DOCTYPE fontconfig SYSTEM "fonts.dtd">
<fontconfig><dir>{folder}/fonts</dir><cachedir>{folder}/cache</cachedir></fontconfig>
"""


def installed() -> str | None:
    """The program that serves already."""
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


def unpacked(packed: Path) -> bytes:
    with packed.open("rb") as file:
        return subprocess.run(["node", "-e", UNPACK], stdin=file, stdout=subprocess.PIPE, check=True).stdout


def get_chromium(target: Path) -> None:
    """Download CARRIER and unpack it to `target`, complete or not at all."""
    shutil.rmtree(target, ignore_errors=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        work = Path(folder)
        npm = [shutil.which("npm") or "npm", "pack", "--silent", "--pack-destination", folder, CARRIER]
        subprocess.run(npm, cwd=folder, check=True, stdout=subprocess.DEVNULL)
        (package,) = work.glob("*.tgz")
        with tarfile.open(package) as archive:
            archive.extractall(work, filter="data")
        packed, made = work / "package" / "bin", work / "made"
        made.mkdir()
        (made / "chromium").write_bytes(unpacked(packed / "chromium.br"))
        (made / "chromium").chmod(0o755)
        for name in ARCHIVES:
            with tarfile.open(fileobj=io.BytesIO(unpacked(packed / f"{name}.tar.br"))) as archive:
                archive.extractall(made / name, filter="data")
        (made / "fonts" / "fonts.conf").write_text(FONTS.format(folder=target / "fonts"), encoding="utf-8")
        made.rename(target)


if __name__ == "__main__":
    if found := installed():
        print(f"the browser tests use {found}")
    elif shutil.which("npm") is None or shutil.which("node") is None:
        print("no npm, so no Chromium is fetched and the browser tests skip; install Chromium or npm to run them")
    else:
        get_chromium(FOLDER)
