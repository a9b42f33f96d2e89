"""Makes the model folder from a run's weights: `python -m benchmarks.demo_model.assemble RUN FOLDER`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from benchmarks.demo_model.architecture import build_model, build_processor
from benchmarks.demo_model.conversation import as_fast_tokenizer
from benchmarks.demo_model.train import load_weights
from tokenizers import Tokenizer


def assemble(run: Path, folder: Path) -> None:
    """Writes a folder that `from_pretrained` loads: weights in one bf16 file, configuration, tokenizer, processor."""
    tokenizer = as_fast_tokenizer(Tokenizer.from_file(str(run / "tokenizer.json")))
    model = build_model(tokenizer).to(torch.bfloat16)
    model.load_state_dict(load_weights(run))
    model.generation_config.max_length = None
    model.generation_config.max_new_tokens = 32
    model.save_pretrained(folder)
    build_processor(tokenizer).save_pretrained(folder)


if __name__ == "__main__":
    assemble(Path(sys.argv[1]), Path(sys.argv[2]))
