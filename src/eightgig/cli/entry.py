"""The entry point: runs the command line and turns every way of failing into a message and an exit code.

Exit codes: 0 done, 1 to 8 the user's errors of `core.errors`, 2 also a wrong option, 70 an error that is ours,
130 stopped with Ctrl-C, 143 with SIGTERM.
"""

from __future__ import annotations

import gc
import os
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path

import typer

from eightgig.cli.application import app
from eightgig.cli.session import Session, Stopped
from eightgig.core.errors import EightGigError
from eightgig.memory.segments import prefer_expandable_segments

EXIT_UNEXPECTED = 70  # EX_SOFTWARE of BSD's sysexits.h
ERROR_LOG = "eightgig-error.log"


def main() -> None:
    """Run the command with the process's arguments and exit with its code."""
    # Read by OpenMP when PyTorch is loaded, later. Threads that spin while they wait make steps several times slower
    # where other programs want the same cores (docs/log.md, 2026-11-24).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    prefer_expandable_segments()  # read by PyTorch's allocator
    exit_code = run_command(sys.argv[1:])
    gc.freeze()  # the system takes it all back; Python would search a plan's objects for garbage first, a second long
    sys.exit(exit_code)


def run_command(arguments: Sequence[str]) -> int:
    """Run the command with `arguments`; its exit code. Messages about failures go to stderr."""
    session = Session()
    command = typer.main.get_command(app)
    try:
        command.main(args=list(arguments), prog_name="eightgig", obj=session)
    except SystemExit as end:  # how Typer ends, also after a wrong option, which it has explained itself
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except EightGigError as error:
        _show_traceback(session)
        _say(f"error: {error}")
        return error.exit_code
    except Stopped as stopped:
        _say(how_to_go_on(session.run_folder))
        return stopped.exit_code
    except Exception as error:
        _show_traceback(session)
        _say(unexpected_error_text(error, _keep_traceback(session.run_folder)))
        return EXIT_UNEXPECTED
    return 0


def how_to_go_on(run_folder: Path | None) -> str:
    """What to say after Ctrl-C or SIGTERM: the command that continues the run."""
    if run_folder is None or not run_folder.exists():
        return "stopped before the first step; nothing was trained"
    if not any((run_folder / "checkpoints").glob("step-*")):
        stopped, how = "stopped before the first checkpoint", "begin again at step 1, with the same settings,"
    else:
        stopped, how = "stopped", "go on from the last checkpoint"
    return f"{stopped}\n  next: {how} with `eightgig train --resume {run_folder}`"


def unexpected_error_text(error: Exception, log: Path) -> str:
    """What to say about an error that no one foresaw."""
    return (
        f"error: something unexpected went wrong: {type(error).__name__}: {error}\n"
        f"  the traceback is in {log}\n"
        "  next: if it isn't clear from there, please report it with that file; "
        "`eightgig --debug ...` shows it on the screen"
    )


def _keep_traceback(run_folder: Path | None) -> Path:
    """Write the traceback of the exception being handled where the user will find it; the path of the file."""
    text = traceback.format_exc()
    for folder in (run_folder, Path.cwd(), Path(tempfile.gettempdir())):
        if folder is None:
            continue
        log = folder / ERROR_LOG
        try:
            log.write_text(text, encoding="utf-8")
        except OSError:
            continue  # a folder that can't be written to is no reason to lose the traceback
        return log
    _say(text)
    return Path("the text above")


def _show_traceback(session: Session) -> None:
    if session.debug:
        _say(traceback.format_exc())


def _say(text: str) -> None:
    sys.stderr.write(text.rstrip("\n") + "\n")
