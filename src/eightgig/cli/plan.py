"""`eightgig plan`: how much GPU memory a run will take."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import typer

from eightgig.cli import options
from eightgig.cli.examples import examples
from eightgig.cli.outcome import print_json
from eightgig.cli.session import stoppable
from eightgig.cli.settings import parse_assignments, resolve_settings

EXAMPLES = examples(
    "eightgig plan llava-1.5-7b --gpu 'RTX 4060'",
    "eightgig plan qwen2.5-vl-7b --vram-gib 12 --set data.max_length=1024",
    "eightgig plan smolvlm2-2.2b --preset low_memory --json",
)
_BAR_CHARACTERS = 30


def plan(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A known model, a folder or a hub id.", show_default=False)
    ],
    preset: options.Preset = None,
    settings: options.Settings = None,
    gpu: Annotated[str | None, typer.Option(metavar="NAME", help="A card, such as 'RTX 4060'.")] = None,
    vram_gib: Annotated[
        float | None, typer.Option(metavar="GIB", min=0.1, help="The card's memory, as CUDA reports it.")
    ] = None,
    reserve_gib: Annotated[
        float, typer.Option(metavar="GIB", min=0.0, help="Memory of the card to keep free, as for a desktop.")
    ] = 0.4,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Say beforehand how much GPU memory training takes, by category. Needs no GPU and no weights.

    The training step itself runs, with tensors that have no content, on the largest sample
    that the settings let through: one image and data.max_length tokens of text.
    """
    from eightgig.app import planning

    resolved = resolve_settings(None, {"--preset": preset, "--model": model}, parse_assignments(settings or []))
    with stoppable():
        planned = planning.plan_run(resolved.config, gpu=gpu, vram_gib=vram_gib, reserve_gib=reserve_gib).to_json()
    if as_json:
        print_json(planned)
        return
    for line in plan_lines(planned):
        typer.echo(line)


def plan_lines(planned: Mapping[str, Any]) -> Iterator[str]:
    """What `planned` says, in lines of at most 80 characters."""
    from eightgig.core.units import format_bytes

    peak, workload = planned["peak"], planned["workload"]
    samples = "sample" if workload["num_samples"] == 1 else "samples"
    yield f"{planned['model']}, {planned['method']}: {workload['num_samples']} {samples}"
    yield f"{workload['num_tokens']:,} tokens at once, image tokens among them"
    yield ""
    largest = max(planned["breakdown"].values())
    for category, size in planned["breakdown"].items():
        bar = "█" * max(0, round(_BAR_CHARACTERS * size / largest))
        yield f"{category:<26}{format_bytes(size):>11}  {bar}"
    yield f"{'on the card at most':<26}{format_bytes(peak['device_bytes']):>11}"
    yield ""
    yield f"PyTorch allocates {format_bytes(peak['allocated_bytes'])} ({peak['moment']})"
    yield f"and reserves {format_bytes(peak['reserved_bytes'])}"
    yield _verdict(planned)


def _verdict(planned: Mapping[str, Any]) -> str:
    from eightgig.core.units import format_bytes

    if planned["fits"] is None:
        return "name a card to see whether it fits: --gpu 'RTX 4060', or --vram-gib 8"
    word = "fits" if planned["fits"] else "does not fit"
    return f"{word}: {planned['gpu']}, {format_bytes(planned['budget_bytes'])} of it for this run"
