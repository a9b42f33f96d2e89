"""The run on a terminal: a live bar with its numbers, and what stays above it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from eightgig.cli import lines
from eightgig.cli.receipt import receipt_rows_lines
from eightgig.cli.session import Session

if TYPE_CHECKING:
    from eightgig.train.events import RunOutcome, RunStart


def stderr_console() -> Console:
    """The terminal behind stderr; no colour where the user wants none (NO_COLOR) or there is no terminal."""
    return Console(stderr=True, highlight=False)


class LiveListener:
    """Draws a bar with loss, learning rate, speed, memory and the time left; everything else scrolls by above it."""

    def __init__(self, session: Session, console: Console) -> None:
        self._session = session
        self._console = console
        self._progress = Progress(
            TextColumn("step {task.completed:,.0f}/{task.total:,.0f}"),
            BarColumn(bar_width=None),
            TextColumn("{task.percentage:>3.0f} %  {task.description}"),
            console=console,
            expand=True,
        )
        self._task = self._progress.add_task("", total=1)
        self._learning, self._speed = Text(""), Text("")
        self._live: Live | None = None

    def on_message(self, text: str) -> None:
        """Print the message."""
        self._console.print(Text(text))

    def on_start(self, start: RunStart) -> None:
        """Print what is about to run, with the receipt, and start the bar."""
        self._session.run_folder = start.run_folder
        title, *rest = lines.start_lines(start)
        self._console.print(Text(title, style="bold"))
        self._print_lines([*rest, ""])
        headings, *rows = receipt_rows_lines(start.receipt_rows)
        self._console.print(Text(headings, style="dim"), no_wrap=True)
        self._print_lines([*rows, ""])
        self._progress.update(self._task, total=start.steps_planned, completed=start.first_step - 1)
        # stdout stays untouched: it is for results, and may be a pipe
        self._live = Live(self._drawn(), console=self._console, refresh_per_second=4, redirect_stdout=False)
        self._live.start()

    def on_step(self, record: Mapping[str, Any]) -> None:
        """Move the bar and renew its numbers."""
        self._learning = Text(lines.learning_text(record), style="bold")
        self._speed = Text(lines.speed_text(record), style="dim")
        self._progress.update(self._task, completed=record["step"], description=lines.eta_text(record))
        if self._live is not None:
            self._live.update(self._drawn())

    def on_validation(self, record: Mapping[str, Any], generations: Sequence[Mapping[str, Any]]) -> None:
        """Print the result with a table of the first answers."""
        self._console.print(Text(lines.validation_text(record), style="bold"))
        if generations:
            self._console.print(answer_table(generations))

    def on_checkpoint(self, path: Path, reason: str) -> None:
        """Print where the checkpoint is."""
        self._console.print(Text(f"checkpoint {path} ({reason})", style="dim"))

    def on_finish(self, outcome: RunOutcome) -> None:
        """Take the bar away: the verb prints the outcome on stdout."""
        self.close()

    def close(self) -> None:
        """Stop drawing and give the cursor back."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _drawn(self) -> Group:
        return Group(self._progress, self._learning, self._speed)

    def _print_lines(self, texts: Sequence[str]) -> None:
        for text in texts:
            self._console.print(Text(text))


def answer_table(generations: Sequence[Mapping[str, Any]]) -> Table:
    """The first answers of a validation, one line each."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", expand=True)
    for name, ratio in (("question", 5), ("expected", 2), ("answer", 3)):
        table.add_column(name, ratio=ratio, no_wrap=True, overflow="ellipsis")
    table.add_column("", width=5, no_wrap=True)
    for generation in generations[: lines.MAX_ANSWERS_SHOWN]:
        *cells, mark = lines.answer_cells(generation)
        style = "green" if mark == "right" else "red"
        table.add_row(*(Text(cell) for cell in cells), Text(mark, style=style))
    return table
