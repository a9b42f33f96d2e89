"""Exact match on held-out scenes, over all and by kind: `python -m benchmarks.demo_model.held_out MODEL NUM_SCENES`."""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path

import torch
from benchmarks.demo_model.architecture import PretrainingForward
from benchmarks.demo_model.conversation import HELD_OUT_SEED, RowEncoder, image_position
from benchmarks.demo_model.feed import render_batch
from transformers import AutoModelForImageTextToText, AutoTokenizer

_ROWS_AT_ONCE = 500


@torch.no_grad()
def measure_held_out(forward: PretrainingForward, encoder: RowEncoder, num_scenes: int) -> dict[str, float]:
    """Share of held-out questions (one a scene) answered word for word, under "all" and under each kind.

    An answer counts when every one of its tokens and its end token is the most likely one after the right tokens
    before it, which is what greedy decoding writes.
    """
    device = next(forward.parameters()).device
    hits: dict[str, list[bool]] = defaultdict(list)
    for start in range(0, num_scenes, _ROWS_AT_ONCE):
        seeds = range(HELD_OUT_SEED + start, HELD_OUT_SEED + min(num_scenes, start + _ROWS_AT_ONCE))
        batch, kinds = render_batch(encoder, seeds, max_num_questions=1)
        ids, is_target = batch.ids.to(device), batch.is_target.to(device)[:, 1:]
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            likeliest = forward.logits(batch.pixels.to(device), ids)[:, :-1].argmax(-1)
        is_right = ((likeliest == ids[:, 1:]) | ~is_target).all(dim=1).tolist()
        for kind, right in zip(kinds, is_right, strict=True):
            hits["all"].append(right)
            hits[kind].append(right)
    return {kind: round(sum(rights) / len(rights), 4) for kind, rights in sorted(hits.items())}


def measure_folder(folder: Path, num_scenes: int) -> dict[str, float]:
    """`measure_held_out` of the bf16 weights in a model folder, computed in fp32."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return measure_held_out(PretrainingForward(model, image_position(tokenizer)), RowEncoder(tokenizer), num_scenes)


if __name__ == "__main__":
    print(json.dumps(measure_folder(Path(sys.argv[1]), int(sys.argv[2]))))
