"""Entry point: a user's mistake is one sentence on stderr and exit code 2, never a traceback."""

from __future__ import annotations

import errno
import logging
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

USER_ERROR, FAILED, INTERRUPTED = 2, 1, 130

# The library names its arguments; here they are options.
_OPTIONS = {
    "num_frames": "--frames", "num_cond_frames": "--cond-frames", "num_segments": "--segments", "num_steps": "--steps",
    "refine_steps": "--steps", "guidance_scale": "--guidance", "t_thresh": "--t-thresh", "frame_rate": "--frame-rate",
    "crf": "--crf", "vae": "--vae", "text_encoder": "--text-encoder", "tokenizer": "--tokenizer",
    "weights": "--weights",
}  # fmt: skip
_ARGUMENT = re.compile(rf"(?<![\w/.\\-])({'|'.join(_OPTIONS)})(?:=(\w*)|(?![\w/\\-]|\.\w))")
_WORDS = ("vae", "text_encoder", "tokenizer", "crf", "weights")  # names of things, too, when no = follows


def main() -> None:
    """Run `lcv` with the process's arguments and exit."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run a command line; returns its exit code. With --debug or LCV_DEBUG=1 errors keep their traceback."""
    debug = "--debug" in arguments or bool(os.environ.get("LCV_DEBUG"))
    arguments = [a for a in arguments if a != "--debug"]
    with _warnings(logging.INFO if debug else logging.WARNING):
        if debug:
            return _invoke(arguments)
        try:
            return _invoke(arguments)
        except KeyboardInterrupt:
            return _fail("stopped", INTERRUPTED)
        except BrokenPipeError:
            return FAILED
        except OSError as error:
            return _fail(_os_error(error), FAILED)
        except Exception as error:
            return _fail(*_explain(error))


class _ToStderr(logging.Handler):
    """Writes where stderr is at the time: a progress bar takes its place for a while."""

    def emit(self, record: logging.LogRecord) -> None:
        print(f"lcv: {record.levelname.lower()}: {_as_options(record.getMessage())}", file=sys.stderr)


@contextmanager
def _warnings(level: int) -> Iterator[None]:
    """The library's warnings on stderr inside the block."""
    log, handler = logging.getLogger("lcv_core"), _ToStderr(level)
    before = log.level
    log.addHandler(handler)
    log.setLevel(level)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(before)


def _invoke(arguments: list[str]) -> int:
    import typer

    from lcv_core.cli.app import app

    try:
        result = typer.main.get_command(app).main(args=arguments, prog_name="lcv", standalone_mode=False)
    except typer.Abort:
        raise KeyboardInterrupt from None
    except Exception as error:
        # Usage errors print themselves. Their class is click's, which some releases of typer carry inside.
        show, code = getattr(error, "show", None), getattr(error, "exit_code", None)
        if show is None or code is None:
            raise
        show()
        return code
    if result == INTERRUPTED:  # what typer makes of Ctrl-C
        raise KeyboardInterrupt
    return result if isinstance(result, int) else 0


def _fail(message: str, code: int) -> int:
    print(f"lcv: {message}", file=sys.stderr)
    return code


def _os_error(error: OSError) -> str:
    where = f" while writing {error.filename}" if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"the disk is full{where}; free some space and repeat the command, finished work is kept"
    name = f"{error.filename}: " if error.filename else ""
    return f"{name}{error.strerror or error}; check the path and its permissions"


def _as_options(message: str) -> str:
    """A sentence of the library with the options of the command line in it."""

    def option(match: re.Match[str]) -> str:
        name, value = match.groups()
        if value is None:
            return name if name in _WORDS else _OPTIONS[name]
        return f"{_OPTIONS[name]} {value}".strip()

    return _ARGUMENT.sub(option, message)


def _explain(error: Exception) -> tuple[str, int]:
    from lcv_core.cli.errors import Stopped
    from lcv_core.errors import InputError, NumericalError, OutOfMemory, is_out_of_memory

    if isinstance(error, Stopped):
        return str(error), INTERRUPTED
    if isinstance(error, InputError):
        return _as_options(str(error)), USER_ERROR
    if isinstance(error, (NumericalError, OutOfMemory)):
        return _as_options(str(error)), FAILED
    if is_out_of_memory(error):
        return (
            "out of memory; try --memory auto, fewer --frames, a smaller --height and --width, --tile 256, --cfg-mode"
            " sequential, or --stream ram (disk where system memory ran out)",
            FAILED,
        )
    kind = type(error).__name__
    return f"unexpected {kind}: {error}\n     this is a bug; --debug shows where, please report it", FAILED
