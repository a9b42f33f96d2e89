"""Whole runs with kept image features beside runs with pixels; what is computed again and what is not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tests import tiny
from tests.app.command_line import CommandLine
from tests.app.listening import Listener

from eightgig.app.training import resume
from eightgig.config import TrainingConfig
from eightgig.core.errors import ConfigError, DataError, DoesNotFit, UnsupportedModel
from eightgig.memory import arrivals
from eightgig.memory.cached_tower import tower_of
from eightgig.models import tower_features as of_models
from eightgig.train import image_features
from eightgig.train.events import RunOutcome, SilentListener
from tiny_families import qwen2_vl, smolvlm
from tiny_family import build_tiny_family

Config = Callable[..., TrainingConfig]
Train = Callable[..., RunOutcome]
CACHED = {"cache_image_features": True}


class FeatureListener(Listener):
    """Tells what was said of image features."""

    @property
    def about_features(self) -> str:
        """How many images there are, and how many were kept from before."""
        (text,) = [text for text in self.texts if text.startswith("image features: ") and "kept from" in text]
        return text


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache folder, empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "eightgig" / "features"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Ten samples with one, two and no images of many shapes; two of them show the same picture."""
    folder = tmp_path / "mixed"
    records: list[dict[str, Any]] = []
    shapes: list[list[tuple[int, int]]] = [[(90, 40)], [(31, 77), (64, 64)], [], [(400, 9)], [(12, 50)], [], [(50, 50)]]
    for index, sizes in enumerate([*shapes, [(50, 50)], [(44, 44)], [(45, 44)]]):
        seed = 6 if index == 7 else index
        names = [
            tiny.write_image(folder / f"{index}-{number}.png", size, seed=seed).name
            for number, size in enumerate(sizes)
        ]
        question = "<image>\n" * len(names) + f"Is {index} even?"
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "no" if index % 2 else "yes"}]
        record = {"id": str(index), "conversations": turns}
        records.append(record | ({"image": names} if names else {}))
    return tiny.write_jsonl(folder / "train.jsonl", records)


NUM_IMAGES = 9 - 1  # of the samples above, the picture that is shown twice counted once


@pytest.fixture
def tower_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of images in each call that computes features."""
    calls: list[int] = []
    real = image_features.FeatureCache._features_of

    def counted(self: Any, encoder: Any, group: Any) -> Any:
        calls.append(len(group))
        return real(self, encoder, group)

    monkeypatch.setattr(image_features.FeatureCache, "_features_of", counted)
    return calls


def numbers(run_folder: Path) -> list[dict[str, Any]]:
    names = ("step", "loss", "grad_norm", "num_tokens", "num_images", "exact_match")
    lines = (run_folder / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key in names} for line in lines]


def weights(run_folder: Path) -> dict[str, torch.Tensor]:
    return load_file(run_folder / "adapter" / "adapter_model.safetensors")


def assert_close(found: Path, expected: Path) -> None:
    """Equal but for rounding: the tower sees an image in other company."""
    for ours, theirs in zip(numbers(found), numbers(expected), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    for name, tensor in weights(expected).items():
        torch.testing.assert_close(weights(found)[name], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_run_is_that_with_pixels_and_its_result_is_proved(
    tiny_config: Config, run_training: Train, data: Path, num_workers: int, tower_calls: list[int]
) -> None:
    sections = {"data": {"data_path": str(data), "num_workers": num_workers}, "training": {"batch_size": 2}}
    fed = run_training(tiny_config(**sections, hardware=CACHED), name="fed", is_proved=num_workers == 0)
    assert sum(tower_calls) == NUM_IMAGES
    tower_calls.clear()
    pixels = run_training(tiny_config(**sections), name="pixels")
    assert not tower_calls
    assert_close(fed.run_folder, pixels.run_folder)
    if num_workers == 0:
        assert fed.verification is not None
        assert fed.verification["relative_difference"] <= 1e-5
        assert fed.verification["adapter_effect"] > 1e-3


def test_the_tower_comes_to_the_card_only_for_features_that_are_missing(
    tiny_config: Config, run_training: Train, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the CPU in the place of both; the tower's weights are those that leave the card while it is loaded."""
    arrived: list[Any] = []
    monkeypatch.setattr(arrivals, "_to_host", arrived.append)
    brought: list[str] = []
    real = image_features.FeatureCache._bring_tower

    def bring(self: Any) -> None:
        tower = tower_of(self._loaded.model, self._loaded.spec.family)
        assert {id(parameter) for parameter in tower.parameters()} == {id(parameter) for parameter in arrived}
        brought.append("tower")
        real(self)

    monkeypatch.setattr(image_features.FeatureCache, "_bring_tower", bring)
    config = tiny_config(data={"data_path": str(data), "num_workers": 0}, hardware=CACHED)
    first = run_training(config, name="first")
    assert brought == ["tower"]
    arrived.clear()
    later = run_training(config, name="later")
    assert brought == ["tower"]
    assert numbers(later.run_folder) == numbers(first.run_folder)
    arrived.clear()
    run_training(tiny_config(data={"data_path": str(data), "num_workers": 0}), name="pixels")
    assert not arrived


def test_no_room_for_the_tower_is_an_error_that_says_so(
    tiny_config: Config, run_training: Train, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(image_features, "tower_of", full)
    with pytest.raises(DoesNotFit, match="features of 1 images at a time"):
        run_training(tiny_config(data={"data_path": str(data), "num_workers": 0}, hardware=CACHED))


def test_the_command_trains_the_embedded_model_with_kept_features(eightgig: CommandLine, cache: Path) -> None:
    arguments = ("train", "--model", "eightgig-demo", "--data", str(eightgig.data), "--run-folder", "run")
    settings = {
        "hardware.cache_image_features": "true",
        "hardware.device": "cpu",
        "hardware.mixed_precision": "fp32",
        "data.num_workers": "0",
        "data.val_fraction": "0.2",
        "training.max_steps": "2",
        "training.gradient_accumulation_steps": "2",
        "validation.num_generated": "1",
        "validation.max_new_tokens": "4",
    }
    ended = eightgig(*arguments, *(part for name, value in settings.items() for part in ("--set", f"{name}={value}")))
    assert ended.code == 0, ended.err
    assert "image features: 14 images, 0 of them kept from before" in ended.out + ended.err
    verification = json.loads((eightgig.folder / "run" / "verification.json").read_text())
    assert verification["ok"]
    assert len(list(cache.iterdir())) == 1
    answer = eightgig(
        "predict", "run", "--image", str(eightgig.data.parent / "images" / "train-0.png"), "--question", "What is it?"
    )
    assert answer.code == 0, answer.err


def test_a_family_with_images_of_any_size(
    tiny_config: Config, run_training: Train, data: Path, tmp_path: Path, tower_calls: list[int]
) -> None:
    model = build_tiny_family(qwen2_vl.TINY[-1], tmp_path / "qwen")
    sections = {"model": {"name": str(model)}, "data": {"data_path": str(data)}, "training": {"batch_size": 2}}
    pixels = run_training(tiny_config(**sections), name="pixels")
    fed = run_training(tiny_config(**sections, hardware=CACHED), name="fed")
    assert sum(tower_calls) == NUM_IMAGES
    assert_close(fed.run_folder, pixels.run_folder)


def test_full_fine_tuning_trains_the_projector_and_saves_the_tower(
    tiny_config: Config, run_training: Train, data: Path
) -> None:
    training = {"method": "full", "lora": None, "max_steps": 2}
    sections = {"data": {"data_path": str(data)}, "training": training}
    pixels = run_training(tiny_config(**sections), name="pixels")
    fed = run_training(tiny_config(**sections, hardware=CACHED), name="fed")
    found, expected = (load_file(run.run_folder / "model" / "model.safetensors") for run in (fed, pixels))
    assert found.keys() == expected.keys()
    assert any("vision_tower" in name for name in expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-4)


def test_a_resumed_run_is_the_uninterrupted_one(tiny_config: Config, run_training: Train, tmp_path: Path) -> None:
    config = tiny_config(hardware=CACHED, training={"lora": {"rank": 4, "dropout": 0.2}})
    whole = run_training(config, name="whole")
    with pytest.raises(KeyboardInterrupt):
        run_training(config, name="stopped", listener=FeatureListener(stop_after=3))
    listener = FeatureListener()
    resumed = resume(tmp_path / "stopped", listener=listener, command="test")
    assert listener.about_features.endswith("14 of them kept from before")
    assert numbers(resumed.run_folder) == numbers(whole.run_folder)
    found, expected = weights(resumed.run_folder), weights(whole.run_folder)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_only_what_is_new_is_computed(
    tiny_config: Config, run_training: Train, data: Path, tower_calls: list[int], cache: Path
) -> None:
    config = tiny_config(data={"data_path": str(data)}, training={"max_steps": 1}, hardware=CACHED)
    run_training(config, name="first")
    (folder,) = cache.iterdir()
    facts = json.loads((folder / "tower.json").read_text())
    assert facts["family"] == "llava"
    assert sum(tower_calls) == NUM_IMAGES

    tower_calls.clear()
    listener = FeatureListener()
    run_training(config, name="again", listener=listener)
    assert not tower_calls
    assert listener.about_features == f"image features: {NUM_IMAGES} images, {NUM_IMAGES} of them kept from before"

    Image.new("RGB", (50, 50), "red").save(data.parent / "3-0.png")
    run_training(config, name="changed")
    assert tower_calls == [1]

    tower_calls.clear()
    damaged = max(folder.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.unlink()
    damaged.write_bytes(content)
    listener = FeatureListener()
    run_training(config, name="damaged", listener=listener)
    assert any(f"{damaged} is damaged" in text for text in listener.texts)
    assert sum(tower_calls) == NUM_IMAGES - 1  # the changed image lies in a file of its own


@pytest.mark.parametrize("change", ["processor", "size", "weights", "seed"])
def test_another_processor_or_tower_has_features_of_its_own(
    tiny_config: Config, run_training: Train, tiny_model: Path, tmp_path: Path, cache: Path, change: str
) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "model")
    values: dict[str, dict[str, Any]] = {
        "model": {"name": str(model)},
        "training": {"max_steps": 1},
        "hardware": CACHED,
        "validation": {"num_generated": 0},
    }
    if change == "seed":
        values["model"]["random_weights_seed"] = 1
    run_training(tiny_config(**values), name="first")
    if change == "processor":
        path = next(path for path in model.glob("*processor*.json") if "image_mean" in path.read_text())
        settings = path.read_text()
        path.write_text(settings.replace("0.48145466", "0.5"))
        assert path.read_text() != settings
    elif change == "size":
        values["data"] = {"image_size": 16}
    elif change == "weights":
        tiny.build_tiny_llava(tmp_path / "other", seed=1, image_px=32)
        shutil.copy(tmp_path / "other" / "model.safetensors", model)
    else:
        values["model"]["random_weights_seed"] = 2
    run_training(tiny_config(**values), name="second")
    assert len(list(cache.iterdir())) == 2


def test_a_limit_that_is_too_small_is_refused_before_anything_is_written(
    tiny_config: Config, run_training: Train, tower_calls: list[int], cache: Path
) -> None:
    # 14 images × 17 rows × 64 values × 4 bytes = 60,928 bytes, and half of that allowed.
    config = tiny_config(hardware={**CACHED, "feature_cache_gib": 30_464 / 2**30})
    with pytest.raises(DoesNotFit, match=r"(?s)the features of 14 images take 59\.50 KiB.*feature_cache_gib"):
        run_training(config)
    assert sum(tower_calls) == 1
    assert not cache.exists()
    run_training(tiny_config(hardware={**CACHED, "feature_cache_gib": 60_928 / 2**30}, training={"max_steps": 1}))


def test_a_disk_that_is_too_small_is_refused_too(
    tiny_config: Config, run_training: Train, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    usage = shutil.disk_usage(cache.parents[2])._replace(free=60_927)
    monkeypatch.setattr(image_features.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(
        DoesNotFit, match=r"the features of 14 images take 59\.50 KiB, and the disk of .* has 59\.50 KiB free"
    ):
        run_training(tiny_config(hardware=CACHED))
    assert not cache.exists()


def test_a_family_that_can_t_be_fed_says_so(tiny_config: Config, run_training: Train, tmp_path: Path) -> None:
    model = build_tiny_family(smolvlm.TINY[0], tmp_path / "smol")
    with pytest.raises(ConfigError, match=r"hardware\.cache_image_features = true: not with"):
        run_training(tiny_config(model={"name": str(model)}, hardware=CACHED))


def test_a_trained_projector_inside_the_tower_says_so(tiny_config: Config, run_training: Train, tmp_path: Path) -> None:
    model = build_tiny_family(qwen2_vl.TINY[0], tmp_path / "qwen")
    training = {"method": "full", "lora": None}
    with pytest.raises(ConfigError, match=r"it trains model\.visual\.merger"):
        run_training(tiny_config(model={"name": str(model)}, training=training, hardware=CACHED))


def test_adapters_inside_the_tower_say_so(tiny_config: Config, run_training: Train) -> None:
    training = {"lora": {"rank": 4, "target_modules": r".*\.(q_proj|v_proj)"}}
    with pytest.raises(ConfigError, match="match inside the vision tower"):
        run_training(tiny_config(training=training, hardware=CACHED))


def test_a_tower_with_dropout_says_so(
    tiny_config: Config, run_training: Train, tiny_model: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "model")
    settings = json.loads((model / "config.json").read_text())
    settings["vision_config"]["attention_dropout"] = 0.1
    (model / "config.json").write_text(json.dumps(settings))
    with pytest.raises(UnsupportedModel, match=r"attention_dropout = 0\.1"):
        run_training(tiny_config(model={"name": str(model)}, hardware=CACHED))


def test_an_image_that_changes_during_the_run_ends_it(tiny_config: Config, run_training: Train, data: Path) -> None:
    class Changing(SilentListener):
        def on_step(self, record: Any) -> None:
            for path in data.parent.glob("*.png"):
                Image.new("RGB", (20, 20), "blue").save(path)

    config = tiny_config(data={"data_path": str(data)}, hardware=CACHED)
    with pytest.raises(DataError, match="is not the file any more whose features were computed"):
        run_training(config, listener=Changing())


def test_the_weights_hash_changes_with_one_bit_of_one_weight() -> None:
    layer = torch.nn.Linear(4, 4)
    before = of_models.weights_sha256(layer)
    assert before == of_models.weights_sha256(layer)
    with torch.no_grad():
        layer.bias[0] += 1e-6
    assert of_models.weights_sha256(layer) != before
