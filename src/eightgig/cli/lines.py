"""The words for the events of a run, the same for both listeners, at most 80 columns wide."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from eightgig.core.units import format_bytes, format_duration
from eightgig.report.wording import format_count, format_method, format_number, format_share

if TYPE_CHECKING:
    from eightgig.train.events import RunStart

MAX_ANSWERS_SHOWN = 4
Record = Mapping[str, Any]


def start_lines(start: RunStart) -> list[str]:
    """What is about to run: model, device, data, parameters, files."""
    first = f", going on at step {start.first_step}" if start.first_step > 1 else ""
    trainable = f"{100 * start.num_trainable_parameters / start.num_parameters:.3g} %"
    lines = [
        f"{format_method(start.method)} of {start.model} on {start.device}, {start.steps_planned:,} steps{first}",
        f"data        {start.num_train_samples:,} training and {start.num_validation_samples:,} validation samples",
        f"trainable   {format_count(start.num_trainable_parameters)} of {format_count(start.num_parameters)} "
        f"parameters ({trainable})",
        f"run folder  {start.run_folder}",
    ]
    if start.num_quarantined:
        lines.append(f"left out    {start.num_quarantined:,} of the samples; quarantine.jsonl says why")
    if start.num_cut_samples:
        lines.append(f"cut         {start.num_cut_samples:,} of the samples to data.max_length text tokens")
    if start.precision_note:
        lines.append(f"note        {start.precision_note}")
    return lines


def learning_text(record: Record) -> str:
    """Loss, learning rate, gradient norm and epoch of a step."""
    text = (
        f"loss {format_number(record['loss'])} · lr {record['learning_rate']:.2e} · "
        f"grad norm {format_number(record['grad_norm'])} · epoch {record['epoch']:.2f}"
    )
    return f"{text} · SKIPPED" if record["skipped"] else text


def speed_text(record: Record) -> str:
    """Tokens and images per second, the share of time spent waiting for data, memory now and at its peak."""
    waiting = record["data_wait_s"] / record["step_s"] if record["step_s"] > 0 else 0.0
    return (
        f"{record['tokens_per_s']:,.0f} tokens/s · {record['images_per_s']:.3g} images/s · "
        f"data wait {100 * waiting:.0f} % · "
        f"{format_bytes(record['memory_now_bytes'])} (peak {format_bytes(record['memory_peak_bytes'])})"
    )


def eta_text(record: Record) -> str:
    """The time to the last step."""
    return f"{format_duration(record['eta_s'])} left"


def validation_text(record: Record) -> str:
    """The result of a validation in one line."""
    when = "before training" if record["step"] == 0 else f"at step {record['step']:,}"
    text = f"validation {when}: loss {format_number(record['loss'])}"
    if record["exact_match"] is not None:
        text += f" · exact match {format_share(record['exact_match'])} of {record['num_generated']}"
    return f"{text} · {format_duration(record['validation_s'])}"


def answer_cells(generation: Record) -> tuple[str, str, str, str]:
    """Question, expected answer, the model's answer and its mark, each on one line."""
    question, expected, answer = (" ".join(str(generation[key]).split()) for key in ("question", "expected", "answer"))
    return question, expected, answer, "right" if generation["correct"] else "wrong"


def answer_lines(generations: Sequence[Record]) -> list[str]:
    """The first answers of a validation as plain lines."""
    lines = []
    for generation in generations[:MAX_ANSWERS_SHOWN]:
        question, expected, answer, mark = answer_cells(generation)
        lines.append(
            f"  {mark}  {_short(question, 34)}  {_short(answer, 16)}  (expected {_short(expected, 12)})".rstrip()
        )
    return lines


def _short(text: str, max_characters: int) -> str:
    return text if len(text) <= max_characters else text[: max_characters - 1] + "…"
