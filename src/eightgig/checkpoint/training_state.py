"""What of a run stands in a checkpoint beside the weights."""

from __future__ import annotations

from eightgig.step.step import TrainingStep


def training_state(step: TrainingStep) -> dict[str, object]:
    """The nested state of optimizer, schedule and loss scaler, its tensors where they lie."""
    return {
        "optimizer": step.optimizer.state_dict(),
        "scheduler": step.scheduler.state_dict(),
        "scaler": step.scaler.state_dict() if step.scaler is not None else None,
    }
