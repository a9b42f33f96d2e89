"""The table of cards and models on a terminal: what each column holds, and never wider than 100."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eightgig.cli.plan_matrix import length_text, matrix_lines
from eightgig.registry import all_specs
from eightgig.registry.gpus import all_gpus

GIB = 1024**3
LADDER = (256, 512, 1024, 2048, 4096, 8192)


def table(
    gpus: list[tuple[str, int | None, int]],
    lengths: dict[str, list[int | None]],
    speeds: dict[tuple[str, str], tuple[float, float]] | None = None,
) -> dict[str, Any]:
    """A matrix of cards (name, GB on the box, bytes) and, for each model, its lengths in the order of the cards."""
    cells = []
    for model, by_card in lengths.items():
        for (gpu, _, _), length in zip(gpus, by_card, strict=True):
            tokens_per_s, relative = (speeds or {}).get((model, gpu), (None, None))
            cell = {"model": model, "gpu": gpu, "max_length_tokens": length, "device_bytes": GIB}
            cells.append(cell | {"tokens_per_s": tokens_per_s, "relative_speed": relative})
    return {
        "preset": "ultra_low_memory",
        "method": "qlora",
        "reserve_bytes": GIB,
        "ladder_tokens": LADDER,
        "common_tokens": 512,
        "reference_gpu": "A100 80GB SXM",
        "gpus": [{"name": n, "vram_gb": gb, "vram_bytes": b, "budget_bytes": b - GIB} for n, gb, b in gpus],
        "models": [{"name": name, "num_parameters": 1, "longest_tokens": 8192} for name in lengths],
        "cells": cells,
        "left_out": [{"model": "qwen-vl", "reason": "no processor"}],
    }


def test_the_whole_table() -> None:
    gpus = [("RTX 4060", 8, 8 * GIB), ("RTX 3070", 8, 8 * GIB), ("12 GiB card", None, 12 * GIB)]
    lengths: dict[str, list[int | None]] = {"llava-1.5-7b": [512, 1024, 8192], "llava-1.5-13b": [None, None, 256]}
    speeds = {("llava-1.5-7b", "RTX 4060"): (1500.0, 0.125), ("llava-1.5-13b", "12 GiB card"): (900.4, 0.2)}
    assert list(matrix_lines(table(gpus, lengths, speeds))) == [
        "longest data.max_length in tokens, QLoRA, preset ultra_low_memory",
        "",
        "cards of ... GB     8   12",
        "llava-1.5-7b     512+   8k",
        "llava-1.5-13b       -  256",
        "",
        "card            memory  models that fit  tokens/s  × A100 80GB SXM",
        "RTX 4060      8.00 GiB           1 of 2     1,500             0.12",
        "RTX 3070      8.00 GiB           1 of 2         -                -",
        "12 GiB card  12.00 GiB           2 of 2       900             0.20",
        "",
        "Tried are 256, 512, 1,024, 2,048, 4,096, 8,192 tokens, as far as a model's positions hold them",
        "beside an image; -: none fits.",
        "+: a card of that size takes more.",
        "1.00 GiB of each card are kept free.",
        "Speeds are at 512 tokens, estimated, the middle one of the models that fit.",
        "Left out: qwen-vl (no processor).",
    ]


def test_where_no_speed_is_known_none_is_spoken_of() -> None:
    lines = list(matrix_lines(table([("T4", 16, 15 * GIB)], {"m": [512]})))
    assert not any("Speeds" in line for line in lines)
    assert any(line.split() == ["T4", "15.00", "GiB", "1", "of", "1", "-", "-"] for line in lines)


def test_a_card_of_the_size_that_takes_nothing_is_a_dash_with_a_plus() -> None:
    lines = list(matrix_lines(table([("a", 8, 8 * GIB), ("b", 8, 8 * GIB)], {"m": [None, 256]})))
    assert "m                -+" in lines


@pytest.mark.parametrize(("length", "text"), [(None, "-"), (256, "256"), (512, "512"), (1024, "1k"), (8192, "8k")])
def test_lengths_are_short(length: int | None, text: str) -> None:
    assert length_text(length) == text


@given(st.data())
def test_all_models_and_cards_fit_100_columns(data: st.DataObject) -> None:
    gpus = [(gpu.name, gpu.vram_gb, gpu.vram_bytes) for gpu in all_gpus()]
    length = st.sampled_from([None, *LADDER])
    lengths = {spec.name: [data.draw(length) for _ in gpus] for spec in all_specs()[:4]}
    lengths |= {spec.name: [512] * len(gpus) for spec in all_specs()} | {"a-very-long-name-" * 6: [8192] * len(gpus)}
    lines = list(matrix_lines(table(gpus, lengths)))
    assert max(map(len, lines)) <= 100
    assert all(any(line.startswith(name[:22]) for line in lines) for name in lengths)
    assert all(any(line.startswith(f"{name} ") for line in lines) for name, _, _ in gpus)
