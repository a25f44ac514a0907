"""Start and stop a real ComfyUI that has this repository as a node pack.

Which ComfyUI: the checkout named by COMFYUI_DIR, else the one that get_comfyui.py puts into `.comfyui/`.
COMFYUI_EXTRA_SITE names a folder of packages that this checkout needs beyond those of `.comfyui/site` and of this
Python (before them on the path); COMFYUI_FRONTEND a folder with another front end's static files.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

REPOSITORY = Path(__file__).resolve().parents[2]
VENDORED = REPOSITORY / ".comfyui" / "core"
SITE = REPOSITORY / ".comfyui" / "site"
# With hyphens, as a clone of the repository has: the folder's name is no Python identifier.
PACK = "longcat-video-nodes"
FOLDERS = ("input", "output", "user", "temp", "models", "custom_nodes")
# More folders for models, as users give them to ComfyUI.
EXTRA = "elsewhere"
EXTRA_PATHS = """\
shared:
  base_path: {folder}
  diffusion_models: transformers
  loras: adapters
  longcat_video: checkpoints
"""
NOT_IN_A_CLONE = (
    ".git",
    ".venv",
    ".comfyui",
    "outputs",
    "models",
    "__pycache__",
    ".*_cache",
    ".hypothesis",
)
START_SECONDS = 240
COLOUR = re.compile(r"\x1b\[[\d;]*m")
# No first-steps dialogs, template pickers, surveys or "what is new" in front of the graph.
SETTINGS = {
    "Comfy.TutorialCompleted": True,
    "Comfy.InstalledVersion": "99.0.0",
    "Comfy.Notification.ShowVersionUpdates": False,
    "Comfy.Workflow.ShowMissingModelsWarning": False,
    "Comfy.Workflow.ShowMissingNodesWarning": True,
    "Comfy.Workflow.WarnBlueprintOverwrite": False,
    "Comfy.Workflow.Persist": False,
    "Comfy.VueNodes.AutoScaleLayout": False,
    "Comfy.Locale": "en",
}


class ServerError(AssertionError):
    """ComfyUI did not start, or died; the message ends with its log."""


@dataclass(frozen=True)
class Core:
    """A ComfyUI checkout and the folders of packages that it needs beyond those of this Python."""

    folder: Path
    sites: tuple[Path, ...] = ()

    @property
    def version(self) -> tuple[int, ...]:
        text = (self.folder / "comfyui_version.py").read_text(encoding="utf-8")
        found = re.search(r'__version__ = "([\d.]+)', text)
        if not found:
            raise ServerError(f"{self.folder} has no readable comfyui_version.py")
        return tuple(map(int, found[1].split(".")))


def find_core() -> Core | None:
    """The checkout to test with; None where there is none.

    Raises:
        ServerError: COMFYUI_DIR names a folder that is no ComfyUI.
    """
    named = os.environ.get("COMFYUI_DIR")
    folder = Path(named).expanduser().resolve() if named else VENDORED
    if not (folder / "main.py").is_file():
        if named:
            raise ServerError(f"COMFYUI_DIR={named} has no main.py")
        return None
    extra = [site for site in os.environ.get("COMFYUI_EXTRA_SITE", "").split(os.pathsep) if site]
    sites = (*(Path(site).expanduser().resolve() for site in extra), SITE)
    return Core(folder, tuple(site for site in sites if site.is_dir()))


@dataclass(frozen=True)
class Options:
    """How a ComfyUI is started.

    packs: further node packs, linked into custom_nodes beside this one under their own names.
    name: of this pack's folder in custom_nodes.
    link: link this repository (what a developer has) or copy it (what a user has, and where links are not allowed).
    installed: folders whose packages can be imported without the pack's help, as after `pip install`.
    without: packages that cannot be imported, as where they are not installed.
    arguments: for main.py, after ours.
    environment: variables on top of this process's.
    """

    packs: tuple[Path, ...] = ()
    name: str = PACK
    link: bool = True
    installed: tuple[Path, ...] = ()
    without: tuple[str, ...] = ()
    arguments: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)


class ComfyServer:
    """A running ComfyUI.

    Attributes:
        url: where it answers, without a slash at the end.
        run: its folder: input, output, user, temp, models, custom_nodes, and elsewhere with further models.
        pack: this repository as it lies in custom_nodes.
        core: the checkout.
    """

    def __init__(self, core: Core, run: Path, options: Options | None = None) -> None:
        """Start ComfyUI in the folder `run` and return when it answers.

        Raises:
            ServerError: it died or did not answer in time.
        """
        self.core = core
        self.run = run
        options = options or Options()
        self.pack = make_run_folder(run, options)
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.log_file = run / "server.log"
        with self.log_file.open("wb") as log:
            self.process = subprocess.Popen(
                command(core, run, port, options),
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment(options),
            )
        try:
            self._wait_until_it_answers()
        except BaseException:
            self.stop()
            raise

    def _wait_until_it_answers(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            self.check_alive()
            try:
                with urllib.request.urlopen(f"{self.url}/system_stats", timeout=5) as answer:
                    json.load(answer)
                    return
            except (urllib.error.URLError, TimeoutError, ConnectionError):
                time.sleep(0.2)
        raise ServerError(f"ComfyUI did not answer within {START_SECONDS} s\n{self.log_tail()}")

    def check_alive(self) -> None:
        """Raise ServerError with the log's end when the process is gone."""
        if self.process.poll() is not None:
            raise ServerError(f"ComfyUI ended with {self.process.returncode}\n{self.log_tail()}")

    def log(self) -> str:
        """All that ComfyUI has printed, without colours."""
        return COLOUR.sub("", self.log_file.read_text(encoding="utf-8", errors="replace"))

    def log_tail(self, lines: int = 60) -> str:
        """The last lines that ComfyUI has printed."""
        return "\n".join(self.log().splitlines()[-lines:])

    def rss(self) -> int:
        """Memory of the server process in bytes."""
        return psutil.Process(self.process.pid).memory_info().rss

    def stop(self) -> None:
        """End the process, and wait for that."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(10)
        if self.process.stdin:
            self.process.stdin.close()


def make_run_folder(run: Path, options: Options) -> Path:
    """ComfyUI's base directory with this pack (and others) in custom_nodes; returns where this pack lies."""
    for name in FOLDERS:
        (run / name).mkdir(parents=True, exist_ok=True)
    (run / EXTRA).mkdir(exist_ok=True)
    (run / f"{EXTRA}.yaml").write_text(EXTRA_PATHS.format(folder=run / EXTRA), encoding="utf-8")
    settings = run / "user" / "default" / "comfy.settings.json"
    settings.parent.mkdir(exist_ok=True)
    settings.write_text(json.dumps(SETTINGS), encoding="utf-8")
    for other in options.packs:
        place(other, run / "custom_nodes" / other.name, link=options.link)
    return place(REPOSITORY, run / "custom_nodes" / options.name, link=options.link)


def place(source: Path, target: Path, *, link: bool) -> Path:
    """`source` at `target`: a link, or a copy without what no clone has."""
    if link:
        try:
            target.symlink_to(source, target_is_directory=True)
            return target
        except OSError:  # Windows, without the right to
            pass
    shutil.copytree(source, target, ignore=shutil.ignore_patterns(*NOT_IN_A_CLONE))
    return target


def command(core: Core, run: Path, port: int, options: Options) -> Sequence[str]:
    """The command line that starts `core`."""
    paths = {sysconfig.get_path("purelib"): None, sysconfig.get_path("platlib"): None}
    sites = [*map(str, core.sites), *paths]
    frontend = os.environ.get("COMFYUI_FRONTEND")
    return [
        *(sys.executable, "-S", str(Path(__file__).with_name("launch.py"))),
        *(part for site in sites for part in ("--site", site)),
        *(part for folder in options.installed for part in ("--install", str(folder))),
        *(part for name in options.without for part in ("--without", name)),
        *(str(core.folder / "main.py"), "--cpu", "--listen", "127.0.0.1", "--port", str(port)),
        *("--base-directory", str(run), "--database-url", f"sqlite:///{run / 'user' / 'comfyui.db'}"),
        *("--extra-model-paths-config", str(run / f"{EXTRA}.yaml")),
        *("--disable-auto-launch", "--preview-method", "latent2rgb"),
        *(("--front-end-root", frontend) if frontend else ()),
        *options.arguments,
    ]


def environment(options: Options) -> dict[str, str]:
    """This process's variables, less those that would make packages importable; no network, one thread."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    ours = {"PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return kept | ours | options.environment


def free_port() -> int:
    """A port nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
