"""From presets, files and flags to a checked configuration, with the source of every value; and back to a file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from pydantic import BaseModel, ValidationError

from eightgig.config import layers, messages, shape, textformat
from eightgig.config.files import known_suffix, read_file
from eightgig.config.layers import KeyPath, Layer
from eightgig.config.method import LOAD_IN_4BIT_PATH, LORA_PATH, METHOD_PATH
from eightgig.config.preset_cards import PRESET_CARDS
from eightgig.config.rules import preset_names_text, value_at
from eightgig.config.schema import SCHEMA_VERSION, TrainingConfig
from eightgig.config.values import shown
from eightgig.core.errors import ConfigError, Problem
from eightgig.core.files import write_text

SET_FLAG = "flag --set"
_NEXT_STEP = "correct what is listed; `eightgig config schema` prints every setting and what it may be"


@dataclass(frozen=True)
class ResolvedConfig:
    """A checked configuration and where each value came from.

    Attributes:
        config: the configuration.
        sources: dotted path of every setting to `default`, `preset NAME`, `file NAME`, `flag --NAME` or `follows ...`.
    """

    config: TrainingConfig
    sources: Mapping[str, str]


class FlagValue(NamedTuple):
    """What a command-line flag of its own (not `--set`) says about one setting."""

    flag: str
    path: str
    value: Any


class Row(NamedTuple):
    """One line of `config show`."""

    path: str
    value: str
    source: str
    reason: str


def load_config(source: Path | str) -> ResolvedConfig:
    """The configuration in the file `source` (JSON or YAML), over the preset that it names. Raises ConfigError."""
    return resolve(Path(source))


def resolve(
    source: Path | str | None,
    overrides: Mapping[str, str] | None = None,
    *,
    flags: Sequence[FlagValue] = (),
    binds_preset: bool = True,
) -> ResolvedConfig:
    """The configuration of `source`, with flags over it.

    Args:
        source: a preset's name, or a file (their names end in a suffix, so none can be a preset's); None for the
            defaults alone.
        overrides: of `--set`, dotted path to the text behind `=`, read as in a YAML file.
        flags: values of other flags; `--set` wins over them.
        binds_preset: whether the configuration names its preset, and so is held to what that fixes; False takes the
            preset's values alone, for comparing methods that its card has no room for.

    Raises:
        ConfigError: with every problem of all sources at once.
    """
    given = [] if source is None else [_source_layer(source)]
    given += [Layer(f"flag {flag}", layers.nested({path: value})) for flag, path, value in flags]
    if overrides:
        given.append(
            Layer(SET_FLAG, layers.nested({path: textformat.parse_scalar(text) for path, text in overrides.items()}))
        )
    return resolve_layers(given, binds_preset=binds_preset)


def resolve_layers(given: Sequence[Layer], *, binds_preset: bool = True) -> ResolvedConfig:
    """The checked configuration of `given` layers over the preset that the topmost of them names; see `resolve`."""
    label = " with ".join(layer.source for layer in given) or "defaults"
    preset = next((layer.values["preset"] for layer in reversed(given) if "preset" in layer.values), None)
    if isinstance(preset, str) and preset in PRESET_CARDS:
        given = [layers.preset_layer(PRESET_CARDS[preset]), *given]
    merged, sources = layers.merge(given)
    if not binds_preset:
        merged.pop("preset", None)
    _check_schema_version(merged, label)
    config = validated(merged, label)
    return ResolvedConfig(config, MappingProxyType(_sources_of_all(config, sources)))


def validated(values: dict[str, Any], label: str) -> TrainingConfig:
    """The configuration with these nested values, which are used up. Raises ConfigError with all problems at once.

    pydantic checks contradictions only between settings that are right in themselves. So wrong ones are taken out and
    the rest is checked again, until nothing more is found; what is said about a setting already reported is left out.
    """
    problems: list[Problem] = []
    reported: set[messages.Location] = set()
    while True:
        try:
            config = TrainingConfig.model_validate(values)
        except ValidationError as error:
            fresh = messages.fresh_errors(error, reported)
            if not fresh:
                break
            problems += [messages.problem(details) for details in fresh]
            reported |= {details["loc"] for details in fresh}
            for details in error.errors(include_url=False):
                layers.remove(values, details["loc"])
        else:
            if not problems:
                return config
            break
    raise ConfigError(problems, source=label, next_step=_NEXT_STEP)


def save_config(config: TrainingConfig, path: Path) -> None:
    """Write every value of `config` to `path`, as JSON or YAML by its suffix; `load_config` gives an equal one back."""
    write_text(path, textformat.render(config.model_dump(mode="json"), known_suffix(path)))


def describe(resolved: ResolvedConfig) -> list[Row]:
    """One row for each setting: path, value, source, and the preset's reason for it or else what it does."""
    rows = []
    card = PRESET_CARDS.get(resolved.config.preset or "")
    for path, source in resolved.sources.items():
        from_preset = card is not None and source == f"preset {card.name}" and path in card.choices
        reason = card.choices[path].reason if card is not None and from_preset else shape.meaning(path)
        rows.append(Row(path, shown(value_at(resolved.config, path)), source, reason))
    return rows


def _source_layer(source: Path | str) -> Layer:
    """The layer of a preset's name or of a file."""
    name = str(source)
    if name in PRESET_CARDS:
        return Layer(f"preset {name}", {"preset": name})
    path = Path(source)
    if not path.suffix and not path.exists():
        problem = Problem("preset", name, f"neither a preset nor a file; {preset_names_text(name)}")
        raise ConfigError([problem], source=name, next_step="name a preset or a configuration file")
    return Layer(f"file {path}", read_file(path))


def _check_schema_version(values: Mapping[str, Any], label: str) -> None:
    """Refuse settings of a newer layout before anything else: what else looks wrong may be right there."""
    version = values.get("schema_version")
    if isinstance(version, int) and version > SCHEMA_VERSION:
        problem = Problem(
            "schema_version", str(version), f"{SCHEMA_VERSION} at most; the settings were written by a newer EightGig"
        )
        raise ConfigError([problem], source=label, next_step="upgrade with `pip install -U eightgig`")


def _sources_of_all(config: TrainingConfig, sources: Mapping[KeyPath, str]) -> dict[str, str]:
    """The source of every setting of `config`, by dotted path, in the order of the schema."""
    return {
        ".".join(path): layers.source_of(path, sources) or _source_if_not_given(config, ".".join(path), sources)
        for path in _paths(config, ())
    }


def _paths(section: BaseModel, prefix: KeyPath) -> Iterator[KeyPath]:
    """The paths of all settings of `section`; a group that is null counts as one setting."""
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            yield from _paths(value, (*prefix, name))
        else:
            yield (*prefix, name)


def _source_if_not_given(config: TrainingConfig, path: str, sources: Mapping[KeyPath, str]) -> str:
    """`default`, or the setting that the one at `path` follows (method, 4-bit weights and LoRA; see `method`)."""
    linked = [METHOD_PATH, LOAD_IN_4BIT_PATH] + ([LORA_PATH] if config.training.lora is None else [])
    leaders = [leader for leader in linked if tuple(leader.split(".")) in sources]
    return f"follows {leaders[0]}" if path in linked and leaders else "default"
