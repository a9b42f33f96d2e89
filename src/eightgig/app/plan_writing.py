"""The settings of a plan as a file that `eightgig train` takes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eightgig.config import TrainingConfig, save_config
from eightgig.config.files import known_suffix
from eightgig.core.errors import ConfigError, DoesNotFit, Problem
from eightgig.core.units import format_bytes


def check_config_path(path: Path) -> None:
    """Raise ConfigError where no configuration can be written to `path`: its suffix is none's, or it exists."""
    known_suffix(path)
    if path.exists():
        raise ConfigError(
            [Problem("--write", str(path), "a file that does not exist yet, so that no settings are lost")],
            source="command line",
            next_step=f"choose another name, or delete {path}",
        )


def write_config(planned: Mapping[str, Any], path: Path) -> None:
    """Write the settings of a plan to `path`, for `eightgig train`.

    Raises:
        DoesNotFit: the plan says that they would not fit; nothing is written.
        ConfigError: as `check_config_path`.
    """
    check_config_path(path)
    if planned["fits"] is False:
        needed, budget = format_bytes(planned["peak"]["device_bytes"]), format_bytes(planned["budget_bytes"])
        raise DoesNotFit(
            f"{path} was not written: the run would take {needed} of the card's {budget}",
            expected="settings that fit the card",
            next_step="plan a smaller data.max_length, data.image_size or model, method qlora, or a larger card",
        )
    save_config(TrainingConfig.model_validate(planned["config"]), path)
