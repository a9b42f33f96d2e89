"""How the command ends: exit codes, messages on stderr, tracebacks only where they are wanted."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cli_events import Calls, run, run_start

from eightgig import __version__
from eightgig.core import errors


def failing(error: BaseException) -> Any:
    """A function of `app` that raises `error`."""

    def act(**_: Any) -> None:
        raise error

    return act


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (errors.DataError, 3),
        (errors.DoesNotFit, 4),
        (errors.UnsupportedModel, 5),
        (errors.EnvironmentProblem, 6),
        (errors.CheckpointError, 7),
    ],
)
def test_a_known_error_says_what_to_do_and_has_its_code(
    kind: type[errors.EightGigError], code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Calls(monkeypatch).answer("training", "train", failing(kind("met 5", expected="at most 4", next_step="type this")))
    assert run(capsys, "train") == (
        code,
        "",
        "no preset and no file of settings given: using preset ultra_low_memory\n"
        "error: met 5\n  expected: at most 4\n  next: type this\n",
    )


def test_a_configuration_error_lists_all_problems(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "train", "--set", "training.lora.rank=0", "--max-steps", "-3")
    assert (code, out) == (2, "")
    assert "training.lora.rank = 0" in err
    assert "training.max_steps = -3" in err
    assert "Traceback" not in err


def test_an_unexpected_error_goes_to_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Calls(monkeypatch).answer("training", "train", failing(ZeroDivisionError("by zero")))
    code, out, err = run(capsys, "train")
    log = tmp_path / "eightgig-error.log"
    assert (code, out) == (70, "")
    assert "something unexpected went wrong: ZeroDivisionError: by zero" in err
    assert f"the traceback is in {log}" in err
    assert "Traceback" not in err
    assert "Traceback (most recent call last)" in log.read_text()
    assert "ZeroDivisionError: by zero" in log.read_text()


def test_an_unexpected_error_in_a_run_goes_into_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "runs" / "a"
    folder.mkdir(parents=True)

    def act(listener: Any, **_: Any) -> None:
        listener.on_start(run_start(folder))
        raise ZeroDivisionError

    Calls(monkeypatch).answer("training", "train", act)
    assert run(capsys, "train")[0] == 70
    assert (folder / "eightgig-error.log").is_file()
    assert not (tmp_path / "eightgig-error.log").exists()


def test_a_run_folder_that_can_not_be_written_to_does_not_lose_the_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def act(listener: Any, **_: Any) -> None:
        listener.on_start(run_start(tmp_path / "gone"))
        raise ZeroDivisionError

    Calls(monkeypatch).answer("training", "train", act)
    assert run(capsys, "train")[0] == 70
    assert (tmp_path / "eightgig-error.log").is_file()


@pytest.mark.parametrize("error", [ZeroDivisionError("by zero"), errors.DataError("a", expected="b", next_step="c")])
def test_debug_shows_the_traceback(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Calls(monkeypatch).answer("training", "train", failing(error))
    assert "Traceback (most recent call last)" in run(capsys, "--debug", "train")[2]


def test_ctrl_c_before_a_run_has_a_folder(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    Calls(monkeypatch).answer("training", "train", failing(KeyboardInterrupt()))
    code, out, err = run(capsys, "train")
    assert (code, out) == (130, "")
    assert err.endswith("stopped before the first step; nothing was trained\n")


def test_ctrl_c_in_a_run_that_gave_its_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def act(listener: Any, **_: Any) -> None:
        listener.on_start(run_start(tmp_path / "gone"))
        raise KeyboardInterrupt

    Calls(monkeypatch).answer("training", "train", act)
    code, _, err = run(capsys, "train")
    assert code == 130
    assert err.endswith("stopped before the first step; nothing was trained\n")


@pytest.mark.parametrize("has_checkpoint", [True, False])
def test_ctrl_c_says_how_to_go_on(
    has_checkpoint: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "runs" / "a"

    def act(listener: Any, **_: Any) -> None:
        listener.on_start(run_start(folder))
        folder.mkdir(parents=True)
        if has_checkpoint:
            (folder / "checkpoints" / "step-00000050").mkdir(parents=True)
        raise KeyboardInterrupt

    Calls(monkeypatch).answer("training", "train", act)
    code, _, err = run(capsys, "train")
    assert code == 130
    assert f"`eightgig train --resume {folder}`" in err
    assert ("begin again at step 1" in err) is not has_checkpoint
    assert ("before the first checkpoint" in err) is not has_checkpoint


def test_a_wrong_option_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "train", "--frobnicate")
    assert (code, out) == (2, "")
    assert "No such option: --frobnicate" in err


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "--version") == (0, f"eightgig {__version__}\n", "")


@pytest.mark.parametrize(
    ("verb", "example"),
    [
        ((), "eightgig demo"),
        (("train",), "eightgig train my.yaml --dry-run"),
        (("predict",), "eightgig predict runs/charts --image chart.png"),
        (("report",), "eightgig report runs/"),
        (("inspect",), "eightgig inspect eightgig-demo"),
        (("demo",), "eightgig demo --output-dir"),
        (("config",), "eightgig config show ultra_low_memory"),
        (("config", "schema"), "eightgig config schema > eightgig.schema.json"),
        (("config", "show"), "eightgig config show my.yaml --json"),
    ],
)
def test_every_help_has_examples_and_fits_80_columns(
    verb: tuple[str, ...], example: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERMINAL_WIDTH", "80")
    code, out, err = run(capsys, *verb, "--help")
    assert (code, err) == (0, "")
    assert example in out
    assert max(map(len, out.splitlines())) <= 80


def test_help_imports_nothing_heavy() -> None:
    script = (
        "import sys\n"
        "from eightgig.cli.entry import run_command\n"
        "code = run_command(['train', '--help'])\n"
        "heavy = {'torch', 'transformers', 'peft', 'bitsandbytes', 'accelerate', 'PIL', 'numpy', 'jinja2'}\n"
        "print(sorted(heavy & sys.modules.keys()), file=sys.stderr)\n"
        "sys.exit(code)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr == "[]\n"
    assert "Usage: eightgig train" in done.stdout


def test_the_module_exits_with_the_commands_code() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "eightgig", "config", "show", "nope"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: nope: 1 problem in the configuration")
    assert done.stdout == ""


def test_a_log_is_free_of_what_a_user_can_not_act_on() -> None:
    script = (
        "import logging, sys, warnings\n"
        "from eightgig.cli.session import start_logging\n"
        "start_logging(debug=sys.argv[1] == 'debug')\n"
        "from tqdm import tqdm\n"
        "list(tqdm(range(3)))\n"
        "logging.getLogger('bitsandbytes.backends').warning('no kernels')\n"
        "warnings.warn_explicit('old', FutureWarning, 'x.py', 1, module='transformers.modeling_utils')\n"
        "warnings.warn_explicit('ours', FutureWarning, 'y.py', 1, module='eightgig.train.loop')\n"
        "logging.getLogger('eightgig.data').warning('ours too')\n"
    )

    def stderr_of(mode: str) -> str:
        done = subprocess.run([sys.executable, "-c", script, mode], capture_output=True, text=True, check=True)
        return done.stderr

    assert stderr_of("usual") == "y.py:1: FutureWarning: ours\nours too\n"
    assert {"no kernels", "x.py:1: FutureWarning: old"} <= set(stderr_of("debug").splitlines())


@pytest.mark.parametrize(("given", "expected"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_waiting_threads_sleep_unless_the_user_says_otherwise(given: str | None, expected: str) -> None:
    show = "import os, sys; sys.argv[1:] = ['--version']; from eightgig.cli import entry\n"
    show += "entry.run_command = lambda _: print(os.environ['OMP_WAIT_POLICY']) or 0\nentry.main()"
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment |= {} if given is None else {"OMP_WAIT_POLICY": given}
    result = subprocess.run([sys.executable, "-c", show], env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == expected
