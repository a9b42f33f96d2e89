"""`predict`: which weights answer, and that they are the ones asked for."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tests.tiny import build_tiny_llava, write_image
from tests.tiny_training import load_tiny
from tests.tiny_training import tiny_config as settings

from eightgig.app import finishing
from eightgig.app.prediction import Prediction, predict
from eightgig.app.training import train
from eightgig.config import TrainingConfig
from eightgig.core.errors import CheckpointError, DataError
from eightgig.data.encode import Encoder
from eightgig.data.sample import ImagePart, Message, TextPart
from eightgig.export.verify import Verification
from eightgig.train.events import SilentListener

QUESTION = "What is the colour of bar 3?"
NUM_TOKENS = 5


@pytest.fixture(scope="module")
def runs(tiny_config: Callable[..., TrainingConfig], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A finished run of each kind, trained hard enough to answer otherwise than its base model."""
    folder = tmp_path_factory.mktemp("runs")
    kinds: dict[str, Any] = {"qlora": {}, "full": {"quantization": {"load_in_4bit": False}, "lora": None}}
    with pytest.MonkeyPatch.context() as patch:
        proof = Verification(0.0, 0.0, 0.0, None, ok=True, how="left out in this test")
        patch.setattr(finishing, "verify_in_fresh_process", lambda plan, reference: proof)
        for kind, training in kinds.items():
            config = tiny_config(training=training | {"learning_rate": 2e-2, "max_steps": 4, "warmup_ratio": 0.0})
            train(config, sources={}, run_folder=folder / kind, listener=SilentListener(), command="test")
    return {kind: folder / kind for kind in kinds}


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_image(tmp_path_factory.mktemp("picture") / "a.png", seed=5)


def _ask(picture: Path, **source: Any) -> Prediction:
    return predict(question=QUESTION, images=[picture], max_new_tokens=NUM_TOKENS, **source)


def _by_hand(model_folder: Path, picture: Path, *, adapter: Path | None = None) -> str:
    """The likeliest tokens from the base model in 4 bits, with the adapter put on by PEFT alone."""
    loaded = load_tiny(model_folder, settings())
    model = loaded.model if adapter is None else PeftModel.from_pretrained(loaded.model, str(adapter)).eval()
    encoder = Encoder(loaded.processor, loaded.spec.family, max_length=512)
    prompt = encoder.encode_prompt([Message("user", (ImagePart(path=picture), TextPart(QUESTION)))])
    ids = prompt.input_ids
    for _ in range(NUM_TOKENS):
        with torch.no_grad():
            token = model(input_ids=ids[None], use_cache=False, **prompt.image_inputs).logits[0, -1].argmax()
        ids = torch.cat([ids, token[None]])
        if int(token) == encoder.tokenizer.eos_token_id:
            break
    return str(encoder.tokenizer.decode(ids[len(prompt.input_ids) :], skip_special_tokens=True).strip())


def test_a_run_answers_with_its_adapter(runs: dict[str, Path], tiny_model: Path, picture: Path) -> None:
    adapter = runs["qlora"] / "adapter"
    prediction = _ask(picture, run=runs["qlora"])
    assert prediction == Prediction(_by_hand(tiny_model, picture, adapter=adapter), "model", adapter)
    assert prediction.answer != _by_hand(tiny_model, picture)
    assert _ask(picture, run=adapter) == prediction  # the run around it gives the settings


def test_an_adapter_by_itself_names_its_base(
    runs: dict[str, Path], tiny_model: Path, picture: Path, tmp_path: Path
) -> None:
    alone = Path(shutil.copytree(runs["qlora"] / "adapter", tmp_path / "adapter"))
    prediction = _ask(picture, run=alone)
    assert (prediction.model, prediction.adapter) == (tiny_model.name, alone)
    moved = Path(shutil.copytree(tiny_model, tmp_path / "moved"))
    assert _ask(picture, run=alone, model=str(moved)) == Prediction(prediction.answer, "moved", alone)


def test_another_model_takes_the_place_of_the_runs_own(runs: dict[str, Path], picture: Path, tmp_path: Path) -> None:
    other = build_tiny_llava(tmp_path / "other", seed=9)
    prediction = _ask(picture, run=runs["qlora"], model=str(other))
    adapter = runs["qlora"] / "adapter"
    assert prediction == Prediction(_by_hand(other, picture, adapter=adapter), "other", adapter)


def test_a_model_as_it_is_has_no_adapter(tiny_model: Path, picture: Path) -> None:
    prediction = _ask(picture, model=str(tiny_model))
    assert (prediction.model, prediction.adapter) == ("model", None)
    assert isinstance(prediction.answer, str)


def test_a_full_run_answers_with_its_own_weights(runs: dict[str, Path], picture: Path) -> None:
    prediction = _ask(picture, run=runs["full"])
    assert prediction.adapter is None
    last = _ask(picture, run=runs["full"])
    assert prediction == last
    (runs["full"] / "model" / "config.json").rename(runs["full"] / "model" / "kept.json")
    with pytest.raises(CheckpointError, match="has no result yet"):
        _ask(picture, run=runs["full"])
    (runs["full"] / "model" / "kept.json").rename(runs["full"] / "model" / "config.json")


def test_pictures_are_looked_at_before_any_model_is_loaded(picture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("eightgig.app.prediction.load_model", load)
    broken = picture.parent / "broken.png"
    broken.write_bytes(picture.read_bytes()[:200])
    for bad, reason in ((broken, "can't be decoded"), (picture.parent / "gone.png", "does not exist")):
        with pytest.raises(DataError, match=reason):
            predict(question=QUESTION, images=[picture, bad], model="eightgig-demo")


def test_a_question_without_a_picture_is_answered(tiny_model: Path) -> None:
    assert predict(question="Yes or no?", images=[], model=str(tiny_model), max_new_tokens=2).model == "model"
