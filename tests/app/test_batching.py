"""Runs that group the samples of a step in one way or another: one and the same training, with less or no padding."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.tiny import write_image, write_jsonl

from eightgig.app.training import resume
from eightgig.config import TrainingConfig
from eightgig.core.errors import ConfigError
from eightgig.registry.gpus import get_gpu
from eightgig.train.events import RunOutcome, SilentListener

Config = Callable[..., TrainingConfig]
Train = Callable[..., RunOutcome]

BATCHING = ("in_order", "by_length", "packed")


class _Stopper(SilentListener):
    """Interrupts the run after some steps."""

    def __init__(self, num_steps: int) -> None:
        self.steps_left = num_steps

    def on_step(self, record: Any) -> None:
        self.steps_left -= 1
        if not self.steps_left:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def uneven_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions of 3 to 150 letters, without an image, with one, and with two."""
    folder = tmp_path_factory.mktemp("uneven")
    records = []
    for index in range(14):
        images = [f"{index}-{number}.png" for number in range(index % 3)]
        for name in images:
            write_image(folder / name, seed=index)
        question = "<image>\n" * len(images) + "why " * (1 + (index * 5) % 37)
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "so " * (1 + index)}]
        records.append({"id": str(index), "conversations": turns} | ({"image": images} if images else {}))
    return write_jsonl(folder / "train.jsonl", records)


def settings(tiny_config: Config, data: Path, batching: str, **training: Any) -> TrainingConfig:
    values = {"batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 5, "batching": batching}
    return tiny_config(data={"data_path": str(data), "max_length": 400}, training={**values, **training})


def step_records(run_folder: Path) -> list[dict[str, Any]]:
    records = map(json.loads, (run_folder / "metrics.jsonl").read_text().splitlines())
    return [record for record in records if record["kind"] == "step"]


def test_all_ways_of_batching_train_alike(tiny_config: Config, run_training: Train, uneven_data: Path) -> None:
    runs = {name: run_training(settings(tiny_config, uneven_data, name), name=name).run_folder for name in BATCHING}
    steps = {name: step_records(folder) for name, folder in runs.items()}
    weights = {name: load_file(folder / "adapter" / "adapter_model.safetensors") for name, folder in runs.items()}
    for name in ("by_length", "packed"):
        for key in ("loss", "grad_norm", "num_tokens", "num_target_tokens", "num_images"):
            ours, plain = ([record[key] for record in steps[which]] for which in (name, "in_order"))
            assert ours == pytest.approx(plain, rel=1e-4), (name, key)
        for path, weight in weights["in_order"].items():
            torch.testing.assert_close(weights[name][path], weight, rtol=1e-2, atol=2e-4)
        texts = [(runs[which] / "generations.jsonl").read_text() for which in (name, "in_order")]
        assert texts[0] == texts[1]
    computed = {name: [record["num_computed_tokens"] for record in steps[name]] for name in BATCHING}
    assert sum(computed["by_length"]) < sum(computed["in_order"])
    assert computed["packed"] == [record["num_tokens"] for record in steps["packed"]]
    assert [record["padding_share"] for record in steps["packed"]] == [0.0] * 5
    for record in steps["in_order"]:
        assert record["padding_share"] == 1 - record["num_tokens"] / record["num_computed_tokens"] > 0


def test_levers_on_memory_change_nothing_about_a_packed_run(
    tiny_config: Config, run_training: Train, uneven_data: Path
) -> None:
    config = settings(tiny_config, uneven_data, "packed", max_steps=2)
    plain = step_records(run_training(config, name="plain").run_folder)
    levers = {
        "cache_image_features": True,
        "offload_layer_inputs": True,
        "mlp_tile_tokens": 20,
        "embedding_on_host": True,
        "streamed_layers": 2,
    }
    config = config.model_copy(update={"hardware": config.hardware.model_copy(update=levers)})
    ours = step_records(run_training(config, name="levers").run_folder)
    assert [record["loss"] for record in ours] == pytest.approx([record["loss"] for record in plain], rel=1e-5)


def test_a_packed_run_goes_on_as_if_it_had_not_stopped(
    tiny_config: Config, run_training: Train, uneven_data: Path
) -> None:
    config = settings(tiny_config, uneven_data, "packed", lora={"rank": 4, "dropout": 0.2})
    whole = run_training(config, name="whole").run_folder
    with pytest.raises(KeyboardInterrupt):
        run_training(config, name="stopped", listener=_Stopper(3))
    stopped = whole.parent / "stopped"
    resume(stopped, listener=SilentListener(), command="test")
    keys = ("step", "loss", "grad_norm", "num_computed_tokens")
    ours, plain = ([[record[key] for key in keys] for record in step_records(folder)] for folder in (stopped, whole))
    assert ours == plain
    expected = load_file(whole / "adapter" / "adapter_model.safetensors")
    found = load_file(stopped / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_packed_run_is_planned_with_a_full_row(tiny_config: Config, run_training: Train, uneven_data: Path) -> None:
    config = settings(tiny_config, uneven_data, "packed")
    folder = run_training(config, find_card=lambda device: get_gpu("RTX 4060")).run_folder
    plan = json.loads((folder / "plan.json").read_text())
    assert plan["workload"]["num_samples"] > 2
    assert plan["workload"]["num_images"] > 2
    longest = max(record["num_computed_tokens"] for record in step_records(folder))
    assert longest <= 2 * plan["workload"]["num_tokens"]
    assert plan["phases"].keys() == {"load", "validate", "train", "save"}


def test_a_family_that_would_mix_samples_up_is_refused(
    tiny_config: Config, run_training: Train, uneven_data: Path
) -> None:
    config = settings(tiny_config, uneven_data, "packed")
    config = config.model_copy(update={"model": config.model.model_copy(update={"name": "qwen3.5-2b"})})
    with pytest.raises(ConfigError, match="DeltaNet") as caught:
        run_training(config)
    assert "by_length" in caught.value.next_step
