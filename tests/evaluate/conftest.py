"""The tiny LLaVA with adapters that do something, and samples of different lengths."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from tests.tiny import build_tiny_llava, write_image, write_jsonl
from tests.tiny_training import load_tiny, tiny_config, trainable

from eightgig.data.encode import Encoder
from eightgig.data.quarantine import Quarantine
from eightgig.data.sample import Sample
from eightgig.data.sources import load_samples
from eightgig.models.load import LoadedModel
from eightgig.step.step import Compute


@dataclass(frozen=True)
class Scene:
    """What evaluation takes."""

    loaded: LoadedModel
    encoder: Encoder
    samples: tuple[Sample, ...]
    compute: Compute


@pytest.fixture(scope="session")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    folder = tmp_path_factory.mktemp("evaluate")
    records = []
    for index in range(7):
        image = write_image(folder / f"{index}.png", seed=index)
        records.append(
            {
                "id": f"s{index}",
                "image": image.name,
                "question": "What is it" + " and where" * (index % 3) + "?",
                "answer": "It is " + "very " * index + "red.",
            }
        )
    path = write_jsonl(folder / "data.jsonl", records)
    loaded = load_tiny(build_tiny_llava(folder / "model"), tiny_config(), adapters=True)
    torch.manual_seed(3)
    for weight in trainable(loaded.model):
        torch.nn.init.normal_(weight, std=0.1)
    encoder = Encoder(loaded.processor, loaded.spec.family, max_length=512)
    samples = load_samples(path, None, Quarantine(folder / "quarantine.jsonl")).samples
    assert len(samples) == 7
    return Scene(loaded, encoder, samples, Compute(torch.device("cpu"), torch.float32, None, loss_chunk_tokens=3))
