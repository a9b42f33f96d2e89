"""The two listeners: plain lines without control characters, and a live bar that fits 80 columns."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from cli_events import GENERATIONS, VALIDATION, run_outcome, run_start, step_event
from rich.console import Console

from eightgig.cli.live_progress import LiveListener
from eightgig.cli.plain_progress import PlainListener
from eightgig.cli.progress import open_listener
from eightgig.cli.session import Session

FOLDER = Path("runs/a")


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        """The time."""
        return self.now_s


def run_events(listener: PlainListener | LiveListener) -> None:
    """One of every event."""
    listener.on_message("computing in fp16: this card has no native bf16 [/]")
    listener.on_start(run_start(FOLDER))
    listener.on_step(step_event(50))
    listener.on_validation(VALIDATION, GENERATIONS)
    listener.on_checkpoint(FOLDER / "checkpoints" / "step-00000050", "lowest validation loss so far")
    listener.on_step(step_event(400, skipped=True))
    listener.on_finish(run_outcome(FOLDER))


def test_plain_lines_say_everything_without_control_characters() -> None:
    stream = io.StringIO()
    session = Session()
    run_events(PlainListener(session, stream))
    text = stream.getvalue()
    assert re.search(r"[\x00-\x09\x0b-\x1f\x7f]", text) is None
    assert text.splitlines() == [
        "computing in fp16: this card has no native bf16 [/]",
        "QLoRA of llava-1.5-7b on cuda, 400 steps",
        "data        6,400 training and 200 validation samples",
        "trainable   20 M of 7.06 B parameters (0.283 %)",
        f"run folder  {FOLDER}",
        "",
        "part              parameters  stored as  4-bit  at 16 bits         now",
        "language linears      6.48 B  uint8      yes     12.06 GiB    3.11 GiB",
        "vision tower           304 M  bfloat16   no     578.89 MiB  578.89 MiB",
        "",
        "step 50/400 · loss 0.4313 · lr 1.80e-04 · grad norm 0.8215 · epoch 0.25 · 3,516 tokens/s · 3.52 images/s · "
        "data wait 5 % · 4.56 GiB (peak 5.22 GiB) · 12 min 05 s left",
        "validation at step 50: loss 1.073 · exact match 25 % of 8 · 21.5 s",
        "  right  How tall is bar 3?  7  (expected 7)",
        "  wrong  Which [red] bar is the tallest of…  a blue circle a…  (expected the first o…)",
        f"checkpoint {FOLDER / 'checkpoints' / 'step-00000050'} (lowest validation loss so far)",
        "step 400/400 · loss 0.4313 · lr 1.80e-04 · grad norm 0.8215 · epoch 2.00 · SKIPPED · 3,516 tokens/s · "
        "3.52 images/s · data wait 5 % · 4.56 GiB (peak 5.22 GiB) · 12 min 05 s left",
    ]
    assert session.run_folder == FOLDER


def test_fast_steps_do_not_flood_a_log() -> None:
    stream, clock = io.StringIO(), Clock()
    listener = PlainListener(Session(), stream, clock)
    for step in range(1, 401):
        listener.on_step(step_event(step))
        clock.now_s += 0.5
    steps = [int(match) for match in re.findall(r"^step (\d+)/400", stream.getvalue(), re.MULTILINE)]
    assert steps == [*range(1, 400, 10), 400]


def test_slow_steps_each_have_a_line() -> None:
    stream, clock = io.StringIO(), Clock()
    listener = PlainListener(Session(), stream, clock)
    for step in range(1, 4):
        listener.on_step(step_event(step))
        clock.now_s += 9
    assert stream.getvalue().count("\n") == 3


def test_what_is_special_about_a_run_is_said() -> None:
    stream = io.StringIO()
    start = run_start(FOLDER, first_step=51, num_quarantined=3, num_cut_samples=1200, precision_note="fp16, not bf16")
    PlainListener(Session(), stream).on_start(start)
    text = stream.getvalue()
    assert "400 steps, going on at step 51" in text
    assert "left out    3 of the samples" in text
    assert "cut         1,200 of the samples" in text
    assert "note        fp16, not bf16" in text


def test_a_validation_without_answers_has_no_exact_match() -> None:
    stream = io.StringIO()
    record = VALIDATION | {"step": 0, "exact_match": None, "num_generated": 0}
    PlainListener(Session(), stream).on_validation(record, [])
    assert stream.getvalue() == "validation before training: loss 1.073 · 21.5 s\n"


@pytest.mark.parametrize("is_coloured", [True, False])
def test_the_live_bar_fits_80_columns_and_reads_without_colour(is_coloured: bool) -> None:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=80, no_color=not is_coloured, highlight=False)
    session = Session()
    run_events(LiveListener(session, console))
    text = stream.getvalue()
    seen = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).replace("\r", "\n")
    assert max(map(len, seen.splitlines())) <= 80
    for said in (
        "no native bf16 [/]",
        "step 400/400",
        "100 %  12 min 05 s left",
        "loss 0.4313 · lr 1.80e-04 · grad norm 0.8215 · epoch 2.00 · SKIPPED",
        "3,516 tokens/s · 3.52 images/s · data wait 5 % · 4.56 GiB (peak 5.22 GiB)",
        "exact match 25 % of 8",
        "right",
        "wrong",
        "Which [red] bar",
    ):
        assert said in seen
    assert ("\x1b[31m" in text) is is_coloured
    assert session.run_folder == FOLDER


def fail_in_a_run() -> None:
    """A run on a terminal that ends in an unexpected error."""
    with open_listener(Session()) as listener:
        assert isinstance(listener, LiveListener)
        listener.on_start(run_start(FOLDER))
        raise ZeroDivisionError


def test_the_terminal_gets_its_cursor_back_when_a_run_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=80)
    monkeypatch.setattr("eightgig.cli.live_progress.stderr_console", lambda: console)
    with pytest.raises(ZeroDivisionError):
        fail_in_a_run()
    assert stream.getvalue().rfind("\x1b[?25h") > stream.getvalue().rfind("\x1b[?25l") >= 0


def test_a_pipe_gets_plain_lines() -> None:
    with open_listener(Session()) as listener:
        assert isinstance(listener, PlainListener)
