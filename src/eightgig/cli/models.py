"""`eightgig models`: which models there are, and what is known about one."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from eightgig.cli.examples import examples
from eightgig.cli.outcome import print_json

if TYPE_CHECKING:
    from eightgig.registry import ModelSpec

_WIDTH_CHARACTERS = 80
_LABEL_CHARACTERS = 16
_EXAMPLE_PX = (1024, 768)  # a photo's shape, for the count of image tokens
_HEADINGS = ("model", "parameters", "image tokens", "licence")

app = typer.Typer(
    help="List the models known by name.\n\nAny other model goes by its folder or hub id; "
    "`eightgig models show` says what is derived for it.",
    epilog=examples(
        "eightgig models",
        "eightgig models --search qwen",
        "eightgig models --vram-gib 8",
        "eightgig models show qwen2.5-vl-7b",
    ),
    invoke_without_command=True,
)


@app.callback()
def models(
    context: typer.Context,
    search: Annotated[
        str | None,
        typer.Option(metavar="WORDS", help="Only models whose name, hub id, family or licence has all these words."),
    ] = None,
    vram_gib: Annotated[
        float | None,
        typer.Option(
            metavar="GIB",
            min=0.1,
            help="Only models of which QLoRA (rank 8) takes less than this before any activation: weights, adapters, "
            "their gradients and optimizer states, and the CUDA context.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print all facts of each model as JSON.")] = False,
) -> None:
    """List the models known by name."""
    if context.invoked_subcommand is not None:
        return
    from eightgig.registry import all_specs

    specs = [spec for spec in all_specs() if search is None or matches(spec, search)]
    least_bytes = None if vram_gib is None else least_bytes_below(specs, vram_gib)
    if least_bytes is not None:
        specs = [spec for spec in specs if spec.name in least_bytes]
    if as_json:
        extra = least_bytes or {}
        print_json([facts_of(spec) | {"least_device_bytes": extra.get(spec.name)} for spec in specs])
        return
    for line in list_lines(specs, least_bytes):
        typer.echo(line)
    if not specs:
        typer.echo(_nothing_found(search, vram_gib))


@app.command("show", epilog=examples("eightgig models show qwen2.5-vl-7b", "eightgig models show ./my-model --json"))
def show(
    name: Annotated[
        str, typer.Argument(metavar="MODEL", help="A known model, a folder or a hub id.", show_default=False)
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print the facts as JSON.")] = False,
) -> None:
    """Show what is known about a model: licence, sizes, image tokens, what is quantised and what is trained."""
    from eightgig.registry import resolve

    spec = resolve(name)
    if as_json:
        print_json(facts_of(spec))
        return
    for line in fact_lines(spec):
        typer.echo(line)


def matches(spec: ModelSpec, search: str) -> bool:
    """Whether every word of `search` is somewhere in the model's names, family or licence; capitals don't matter."""
    facts = spec.facts
    text = " ".join((facts.name, *facts.aliases, facts.hub_id or "", spec.family.name, facts.licence)).lower()
    return all(word in text for word in search.lower().split())


def least_bytes_below(specs: Sequence[ModelSpec], vram_gib: float) -> dict[str, int]:
    """For each of `specs` that takes less than `vram_gib`: its name, and the bytes that QLoRA takes at least."""
    from eightgig.core.units import GIB
    from eightgig.models.least_memory import RANK, least_memory

    least = {spec.name: least_memory(spec, RANK).total_bytes for spec in specs}
    return {name: size for name, size in least.items() if size < vram_gib * GIB}


def facts_of(spec: ModelSpec) -> dict[str, Any]:
    """Everything known about a model, as JSON knows it."""
    facts, family = spec.facts, spec.family
    return {
        "name": facts.name,
        "aliases": list(facts.aliases),
        "family": family.name,
        "hub_id": facts.hub_id,
        "folder": None if facts.folder is None else str(facts.folder),
        "licence": facts.licence,
        "licence_url": facts.licence_url,
        "source": facts.source,
        "num_parameters": facts.num_parameters or None,
        "image_px": facts.image_px or None,
        "image_tokens": {_shape(*_EXAMPLE_PX): _image_tokens(spec)},
        "image_placeholder": family.image_placeholder,
        "end_of_turn": family.end_of_turn,
        "modules": {
            "language_model": family.modules.language_model,
            "towers": list(family.modules.towers),
            "projectors": list(family.modules.projectors),
            "lm_head": family.modules.lm_head,
        },
        "lora_pattern": family.lora_pattern,
        "num_lora_layers": facts.num_language_linears or None,
        "keep_16bit": list(family.keep_16bit),
        "fp32_in_fp16": list(family.fp32_in_fp16),
        "dtype_caution": family.dtype_caution or None,
        "accepts_image_features": family.accepts_image_features,
        "derivation": list(family.derivation),
    }


def list_lines(specs: Sequence[ModelSpec], least_bytes: Mapping[str, int] | None = None) -> Iterator[str]:
    """A line a model, in columns; a licence that is too long for its line is written out by `models show`."""
    if not specs:
        return
    from eightgig.core.units import format_bytes
    from eightgig.report.wording import format_count

    rows = [_HEADINGS if least_bytes is None else (*_HEADINGS[:3], "at least", _HEADINGS[3])]
    for spec in specs:
        count = format_count(spec.facts.num_parameters or None)
        least = () if least_bytes is None else (format_bytes(least_bytes[spec.name]),)
        rows.append((spec.name, count, f"{_image_tokens(spec):,}", *least, spec.facts.licence))
    widths = [max(map(len, column)) for column in list(zip(*rows, strict=True))[1:-1]]
    name_width = max(len(row[0]) for row in rows)
    for name, *numbers, licence in rows:
        columns = [f"{text:>{width}}" for text, width in zip(numbers, widths, strict=True)]
        line = "  ".join([f"{name:<{name_width}}", *columns, licence])
        yield line if len(line) <= _WIDTH_CHARACTERS else f"{line[: _WIDTH_CHARACTERS - 1]}…"
    yield ""
    yield f"image tokens: of a picture of {_shape(*_EXAMPLE_PX)} px, at the model's own image size"
    if least_bytes is not None:
        yield "at least: what QLoRA takes on the card before any activation, which come on top"


def _nothing_found(search: str | None, vram_gib: float | None) -> str:
    found = [] if search is None else [f"has {search!r} in its name, hub id, family or licence"]
    if vram_gib is not None:
        found.append(f"leaves room on {vram_gib:g} GiB")
    return f"no model {' and '.join(found)}; `eightgig models` lists all"


def fact_lines(spec: ModelSpec) -> Iterator[str]:
    """A model's facts, a label and a text a line, wrapped to 80 columns."""
    from eightgig.report.wording import format_count

    facts, family, paths = spec.facts, spec.family, spec.family.modules
    count = "counted once it is loaded"
    if facts.num_parameters:
        count = f"{format_count(facts.num_parameters)} ({facts.num_parameters:,})"
    rows = [
        ("model", f"{facts.name}, family {family.name}"),
        ("also called", ", ".join(facts.aliases)),
        ("weights", spec.location),
        ("licence", f"{facts.licence} {facts.licence_url}".rstrip()),
        ("parameters", count),
        ("images", _images_text(spec)),
        ("in the prompt", f"{family.image_placeholder} for an image; an answer ends with {family.end_of_turn}"),
        ("language model", paths.language_model),
        ("towers", ", ".join(paths.towers)),
        ("projectors", ", ".join(paths.projectors)),
        ("adapters on", f"{facts.num_language_linears or '?'} layers: {family.lora_pattern}"),
        ("kept in 16 bits", ", ".join(family.keep_16bit)),
        ("in fp16 mode", f"{', '.join(family.fp32_in_fp16)} in fp32" if family.fp32_in_fp16 else ""),
        ("caution", family.dtype_caution),
        ("image features", "can be given in place of pixels" if family.accepts_image_features else ""),
        ("numbers from", facts.source),
        *(("derived", text) for text in family.derivation),
    ]
    for label, text in rows:
        if text:
            yield from _wrapped(label, text)


def _images_text(spec: ModelSpec) -> str:
    own = f"{spec.facts.image_px} px; " if spec.facts.image_px else ""
    return f"{own}{_image_tokens(spec):,} tokens for a picture of {_shape(*_EXAMPLE_PX)} px at the model's own size"


def _image_tokens(spec: ModelSpec) -> int:
    width_px, height_px = _EXAMPLE_PX
    return spec.family.num_image_tokens(spec.facts, None, width_px=width_px, height_px=height_px)


def _shape(width_px: int, height_px: int) -> str:
    return f"{width_px} × {height_px}"


def _wrapped(label: str, text: str) -> list[str]:
    return textwrap.wrap(
        text,
        _WIDTH_CHARACTERS,
        initial_indent=f"{label:<{_LABEL_CHARACTERS}}",
        subsequent_indent=" " * _LABEL_CHARACTERS,
        break_long_words=False,
        break_on_hyphens=False,
    )
