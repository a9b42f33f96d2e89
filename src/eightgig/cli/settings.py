"""From options (`train`, `plan`, `config show`) to a resolved configuration. Defaults < preset < file < options."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from eightgig.core.errors import ConfigError, Problem

if TYPE_CHECKING:
    from eightgig.config import ResolvedConfig

DEFAULT_PRESET = "ultra_low_memory"
_COMMAND_LINE = "command line"

FLAG_PATHS: Mapping[str, str] = {
    "--preset": "preset",
    "--model": "model.name",
    "--random-weights": "model.random_weights_seed",
    "--data": "data.data_path",
    "--val": "data.val_path",
    "--image-root": "data.image_root",
    "--output-dir": "output_dir",
    "--max-steps": "training.max_steps",
    "--cap-gib": "hardware.cap_gib",
    "--no-rehearsal": "hardware.rehearsal",
}


def parse_assignments(assignments: Iterable[str]) -> dict[str, str]:
    """Setting path to text, of `--set PATH=VALUE`; where a path stands twice the last one counts.

    Raises:
        ConfigError: naming every assignment without a path or `=`.
    """
    overrides: dict[str, str] = {}
    problems = []
    for assignment in assignments:
        path, equals, value = assignment.partition("=")
        if not equals or not path.strip():
            problems.append(Problem("--set", assignment, "PATH=VALUE, such as training.lora.rank=16"))
        overrides[path.strip()] = value
    if problems:
        raise ConfigError(
            problems, source=_COMMAND_LINE, next_step="`eightgig config schema` prints the path of every setting"
        )
    return overrides


def resolve_settings(
    source: str | None,
    flags: Mapping[str, object | None],
    overrides: Mapping[str, str],
    *,
    binds_preset: bool = True,
) -> ResolvedConfig:
    """The configuration of a preset's name or a file, and options (flag -> value, None = not given).

    Where neither `source` nor an option names a preset, it is DEFAULT_PRESET. For `binds_preset` see
    `eightgig.config.resolve`.
    """
    from eightgig.config import FlagValue, resolve

    given = [FlagValue(flag, FLAG_PATHS[flag], value) for flag, value in flags.items() if value is not None]
    chosen = DEFAULT_PRESET if uses_default_preset(source, flags, overrides) else source
    return resolve(chosen, overrides, flags=given, binds_preset=binds_preset)


def uses_default_preset(source: str | None, flags: Mapping[str, object | None], overrides: Mapping[str, str]) -> bool:
    """Whether nothing names a preset, or a file to start from."""
    return source is None and flags["--preset"] is None and "preset" not in overrides


def refuse_beside_resume(given: Mapping[str, object | None]) -> None:
    """Raise ConfigError if anything but `--resume` is given: a resumed run keeps the settings that it began with."""
    problems = [
        Problem(name, str(value), "not together with --resume, which keeps the settings of the run")
        for name, value in given.items()
        if value is not None
    ]
    if problems:
        raise ConfigError(
            problems,
            source=_COMMAND_LINE,
            next_step="leave them out to go on with the run, or leave --resume out to start a new one",
        )
