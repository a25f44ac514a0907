"""Entry point: a user's mistake is one sentence on stderr and exit code 2, never a traceback."""

from __future__ import annotations

import errno
import logging
import os
import sys

USER_ERROR, FAILED, INTERRUPTED = 2, 1, 130


def main() -> None:
    """Run `lcv` with the process's arguments and exit."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run a command line; returns its exit code. With --debug or LCV_DEBUG=1 errors keep their traceback."""
    debug = "--debug" in arguments or bool(os.environ.get("LCV_DEBUG"))
    arguments = [a for a in arguments if a != "--debug"]
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.INFO if debug else logging.WARNING)
    if debug:
        return _invoke(arguments)
    try:
        return _invoke(arguments)
    except KeyboardInterrupt:
        return _fail("stopped; finished work is kept, the same command goes on from it", INTERRUPTED)
    except BrokenPipeError:
        return FAILED
    except OSError as error:
        return _fail(_os_error(error), FAILED)
    except Exception as error:
        return _fail(*_explain(error))


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
    return result if isinstance(result, int) else 0


def _fail(message: str, code: int) -> int:
    print(f"lcv: {message}", file=sys.stderr)
    return code


def _os_error(error: OSError) -> str:
    if error.errno == errno.ENOSPC:
        where = f" while writing {error.filename}" if error.filename else ""
        return f"the disk is full{where}; free some space and repeat the command, finished work is kept"
    return str(error)


def _explain(error: Exception) -> tuple[str, int]:
    import torch

    from lcv_core.errors import InputError, NumericalError

    if isinstance(error, InputError):
        return str(error), USER_ERROR
    if isinstance(error, NumericalError):
        return str(error), FAILED
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error):
        return (
            "out of memory; try fewer --frames, a smaller --height and --width, --tile 256, or --cfg-mode sequential",
            FAILED,
        )
    kind = type(error).__name__
    return f"unexpected {kind}: {error}\n     this is a bug; --debug shows where, please report it", FAILED
