"""`eightgig models`: which models there are, and what is known about one."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
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
    epilog=examples("eightgig models", "eightgig models --search qwen", "eightgig models show qwen2.5-vl-7b"),
    invoke_without_command=True,
)


@app.callback()
def models(
    context: typer.Context,
    search: Annotated[
        str | None,
        typer.Option(metavar="WORDS", help="Only models whose name, hub id, family or licence has all these words."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print all facts of each model as JSON.")] = False,
) -> None:
    """List the models known by name."""
    if context.invoked_subcommand is not None:
        return
    from eightgig.registry import all_specs

    specs = [spec for spec in all_specs() if search is None or matches(spec, search)]
    if as_json:
        print_json([facts_of(spec) for spec in specs])
        return
    for line in list_lines(specs):
        typer.echo(line)
    if not specs:
        typer.echo(f"no model has {search!r} in its name, hub id, family or licence; `eightgig models` lists all")


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


def list_lines(specs: Sequence[ModelSpec]) -> Iterator[str]:
    """A line a model, in columns; a licence that is too long for its line is written out by `models show`."""
    from eightgig.report.wording import format_count

    rows = [_HEADINGS] if specs else []
    for spec in specs:
        count = format_count(spec.facts.num_parameters or None)
        rows.append((spec.name, count, f"{_image_tokens(spec):,}", spec.facts.licence))
    widths = [max(len(row[column]) for row in rows) for column in range(3)] if rows else []
    for name, parameters, tokens, licence in rows:
        line = f"{name:<{widths[0]}}  {parameters:>{widths[1]}}  {tokens:>{widths[2]}}  {licence}"
        yield line if len(line) <= _WIDTH_CHARACTERS else f"{line[: _WIDTH_CHARACTERS - 1]}…"
    if specs:
        yield ""
        yield f"image tokens: of a picture of {_shape(*_EXAMPLE_PX)} px, at the model's own image size"


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
