"""Metrics to TensorBoard, where it is installed."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol


class ScalarWriter(Protocol):
    """The part of TensorBoard's writer that is used."""

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        """Add one point to the curve `tag`."""

    def close(self) -> None:
        """Write out what is pending."""


def open_writer(folder: Path) -> ScalarWriter | None:
    """A writer into `folder`, or None where TensorBoard is not installed."""
    if find_spec("tensorboard") is None:
        return None
    from torch.utils.tensorboard import SummaryWriter

    writer: ScalarWriter = SummaryWriter(log_dir=str(folder))
    return writer


def write_record(writer: ScalarWriter, record: Mapping[str, Any]) -> None:
    """Every number of a metrics record, as `kind/name` at the record's step."""
    for name, value in record.items():
        if name != "step" and isinstance(value, int | float) and not isinstance(value, bool):
            writer.add_scalar(f"{record['kind']}/{name}", value, record["step"])
