"""`eightgig plan`: how much GPU memory a run will take."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from eightgig.cli import options
from eightgig.cli.examples import examples
from eightgig.cli.outcome import print_json
from eightgig.cli.plan_lines import compare_lines, plan_lines
from eightgig.cli.session import stoppable
from eightgig.cli.settings import parse_assignments, resolve_settings, uses_default_preset

if TYPE_CHECKING:
    from eightgig.config import ResolvedConfig

EXAMPLES = examples(
    "eightgig plan llava-1.5-7b --gpu 'RTX 4060'",
    "eightgig plan llava-1.5-7b --gpu 'RTX 4060' --data train.jsonl --write planned.yaml",
    "eightgig plan qwen2.5-vl-7b --vram-gib 12 --set data.max_length=1024",
    "eightgig plan smolvlm2-2.2b --vram-gib 16 --compare",
    "eightgig plan smolvlm2-2.2b --preset low_memory --json",
    "eightgig plan smolvlm2-2.2b --matrix --html cards.html",
)
METHOD = "training.method"
METHODS = ("full", "lora", "qlora")


def plan(  # noqa: PLR0913 - the parameters are the command line itself
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="A known model, a folder or a hub id.", show_default=False)
    ] = None,
    method: Annotated[
        str | None, typer.Option(metavar="NAME", help="qlora, lora or full; else told from the settings.")
    ] = None,
    preset: options.Preset = None,
    settings: options.Settings = None,
    data: options.Data = None,
    val: options.Validation = None,
    image_root: options.ImageRoot = None,
    gpu: Annotated[str | None, typer.Option(metavar="NAME", help="A card, such as 'RTX 4060'.")] = None,
    vram_gib: Annotated[
        float | None, typer.Option(metavar="GIB", min=0.1, help="The card's memory, as CUDA reports it.")
    ] = None,
    reserve_gib: Annotated[
        float, typer.Option(metavar="GIB", min=0.0, help="Memory of the card to keep free, as for a desktop.")
    ] = 0.4,
    compare: Annotated[
        bool, typer.Option("--compare", help="Plan full fine-tuning, LoRA and QLoRA side by side.")
    ] = False,
    write: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the settings to a new file, for `eightgig train FILE`.")
    ] = None,
    as_given: Annotated[
        bool, typer.Option("--as-given", help="Plan the settings as they are; look for no faster ones that fit.")
    ] = False,
    matrix: Annotated[
        bool, typer.Option("--matrix", help="Every known model on every known card; takes half an hour.")
    ] = False,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the plan, or the matrix, as a page for a browser.")
    ] = None,
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Plan anew what was planned before.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Say beforehand how much GPU memory training takes, by category. Needs no GPU and no weights.

    The training step itself runs, with tensors that have no content, on the largest batch
    of your data; without data, on one image and data.max_length tokens of text.
    For a card it looks for the fastest settings that fit, and keeps those that you give.
    """
    overrides = parse_assignments(settings or [])
    if matrix:
        _draw_matrix(model, reserve_gib=reserve_gib, html=html, as_json=as_json)
        return
    if model is None:
        raise typer.BadParameter("give a MODEL; `eightgig models` lists those known by name")
    if compare and (method is not None or METHOD in overrides or write is not None or html is not None):
        raise typer.BadParameter("--compare plans every method; leave out --method, --write and --html")
    from eightgig.app import planning
    from eightgig.app.card_wanted import CardWanted
    from eightgig.app.plan_writing import check_config_path

    flags = {"--preset": preset, "--model": model, "--data": data, "--val": val, "--image-root": image_root}
    if write is not None:
        check_config_path(write)
    card = CardWanted(gpu=gpu, vram_gib=vram_gib, reserve_gib=reserve_gib)
    if compare:
        configs = {name: _of_method(name, flags, overrides, is_compared=True).config for name in METHODS}
        with stoppable():
            answer = planning.compare_as_json(configs, card, uses_cache=not no_cache)
        lines = compare_lines(answer["compare"])
    else:
        resolved = _of_method(method, flags, overrides, is_compared=False)
        fixed = None if as_given else fixed_settings(resolved)
        with stoppable():
            answer = planning.plan_as_json(resolved.config, card, uses_cache=not no_cache, fixed=fixed)
        lines = plan_lines(answer)
    _hand_over(answer, lines, as_json=as_json, html=html, write=write)


def _hand_over(
    answer: Mapping[str, Any], lines: Iterable[str], *, as_json: bool, html: Path | None, write: Path | None
) -> None:
    """Print the answer, and write what was asked for."""
    if as_json:
        print_json(answer)
    else:
        for line in lines:
            typer.echo(line)
    if html is not None:
        from eightgig.app.reporting import write_plan_page  # loads Pillow, which a kept plan needs not wait for

        write_plan_page(html, answer)
    if write is not None:
        from eightgig.app.plan_writing import write_config

        write_config(answer, write)


def _of_method(
    method: str | None, flags: Mapping[str, object | None], overrides: Mapping[str, str], *, is_compared: bool
) -> ResolvedConfig:
    """The settings with `method`, which counts as `--set training.method` would.

    A preset that was named holds, with what it fixes; values of one that was not, or that is compared, only fill in.
    """
    if is_compared and method == "full":  # what was said of adapters is for the methods that have some
        overrides = {path: text for path, text in overrides.items() if not path.startswith("training.lora")}
    given = overrides if method is None else {METHOD: method, **overrides}
    is_free = is_compared or (method is not None and uses_default_preset(None, flags, overrides))
    return resolve_settings(None, flags, given, binds_preset=not is_free)


def fixed_settings(resolved: ResolvedConfig) -> frozenset[str]:
    """Paths of the settings that the user chose: by a flag, or by naming a preset or a file."""
    chosen = ("flag", "file", "follows")
    return frozenset(path for path, source in resolved.sources.items() if source.startswith(chosen))


def _draw_matrix(model: str | None, *, reserve_gib: float, html: Path | None, as_json: bool) -> None:
    from eightgig.app.gpu_matrix import matrix
    from eightgig.app.reporting import write_matrix_page
    from eightgig.cli.plan_matrix import matrix_lines
    from eightgig.registry import resolve

    specs = None if model is None else [resolve(model, None)]
    with stoppable():
        table = matrix(specs, reserve_gib=reserve_gib, on_progress=lambda text: typer.echo(text, err=True)).to_json()
    if html is not None:
        write_matrix_page(html, table)
    if as_json:
        print_json(table)
        return
    for line in matrix_lines(table):
        typer.echo(line)
