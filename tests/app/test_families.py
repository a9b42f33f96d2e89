"""Whole runs of models that are not LLaVA: a family with images of any size, and one that no family knows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests import tiny

from eightgig.app.prediction import predict
from eightgig.config import TrainingConfig
from eightgig.train.events import RunOutcome, SilentListener
from tiny_families import qwen2_vl
from tiny_family import build_tiny_family
from unknown_families import build_llava_next

Config = Callable[..., TrainingConfig]
Train = Callable[..., RunOutcome]


class _Messages(SilentListener):
    def __init__(self) -> None:
        self.texts: list[str] = []

    def on_message(self, text: str) -> None:
        self.texts.append(text)


@pytest.fixture(scope="module")
def mixed_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Samples with one, two and no images of many shapes."""
    folder = tmp_path_factory.mktemp("mixed")
    records: list[dict[str, Any]] = []
    for index, sizes in enumerate(([(90, 40)], [(31, 77), (64, 64)], [], [(400, 9)], [(12, 50)], [], [(50, 50)])):
        names = [
            tiny.write_image(folder / f"{index}-{number}.png", size, seed=index).name
            for number, size in enumerate(sizes)
        ]
        question = "<image>\n" * len(names) + f"Is {index} even?"
        answer = "no" if index % 2 else "yes"
        record = {"id": str(index), "conversations": [_turn("human", question), _turn("gpt", answer)]}
        records.append(record | ({"image": names} if names else {}))
    return tiny.write_jsonl(folder / "train.jsonl", records)


def _turn(speaker: str, text: str) -> dict[str, str]:
    return {"from": speaker, "value": text}


def _config(tiny_config: Config, model: Path, data: Path, image_size: int, **changes: Any) -> TrainingConfig:
    return tiny_config(
        model={"name": str(model)},
        data={"data_path": str(data), "image_size": image_size, **changes},
        training={"batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 4, "learning_rate": 2e-3},
    )


def test_a_family_with_images_of_any_size(
    tiny_config: Config, run_training: Train, tmp_path: Path, mixed_data: Path
) -> None:
    folder = build_tiny_family(qwen2_vl.TINY[1], tmp_path / "model")
    # Workers that are started anew get the processor pickled, with its class made at run time.
    config = _config(tiny_config, folder, mixed_data, 40, num_workers=1, worker_start_method="spawn")
    outcome = run_training(config)
    assert outcome.verification is not None
    assert outcome.verification["ok"]
    assert outcome.verification["relative_difference"] <= 1e-5
    assert "interpolated" not in outcome.verification["how"]  # another size changes nothing in the model
    answer = predict(run=outcome.run_folder, question="Is 2 even?", images=[mixed_data.parent / "0-0.png"])
    assert answer.model == "model"


def test_a_model_of_no_family_trains_and_says_what_was_derived(
    tiny_config: Config, run_training: Train, tmp_path: Path, mixed_data: Path
) -> None:
    listener = _Messages()
    folder = build_llava_next(tmp_path / "model")
    outcome = run_training(_config(tiny_config, folder, mixed_data, 336), listener=listener)
    assert outcome.verification is not None
    assert outcome.verification["ok"]
    said = "\n".join(listener.texts)
    assert "no family of the registry has model_type llava_next" in said
    assert "filled up with zeros in a batch: pixel_values" in said
    assert "data.image_size = 336 changes nothing" in said
