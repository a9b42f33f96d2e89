"""`eightgig predict`: an answer to a question about pictures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from peft import PeftModel

from eightgig.config import ModelConfig, TrainingConfig, TrainingMethod, load_config
from eightgig.core.errors import CheckpointError, DataError
from eightgig.data.encode import Encoder
from eightgig.data.quarantine import SampleProblem
from eightgig.data.sample import ImagePart, Message, TextPart
from eightgig.evaluate.generate import answer_prompts
from eightgig.models.load import load_model
from eightgig.models.trainable import ADAPTER_FOLDER
from eightgig.registry import resolve
from eightgig.train.run_folder import RunFolder
from eightgig.train.setup import build_compute, choose_place

ADAPTER_CONFIG = "adapter_config.json"
FULL_MODEL_FOLDER = "model"


@dataclass(frozen=True)
class Prediction:
    """An answer, and what gave it; `adapter` is None for a model as it is."""

    answer: str
    model: str
    adapter: Path | None


@dataclass(frozen=True)
class _Source:
    """The settings to load with, and the adapter to put on the model."""

    config: TrainingConfig
    adapter: Path | None


def predict(
    *,
    question: str,
    images: Sequence[Path],
    run: Path | None = None,
    model: str | None = None,
    max_new_tokens: int = 64,
) -> Prediction:
    """The greedy answer to `question` about `images`.

    Args:
        question: what to ask.
        images: pictures, in the order in which they are shown to the model.
        run: a run's folder, or an adapter's; None = a model as it is.
        model: the model to ask, or to put the adapter of `run` on instead of its own.
        max_new_tokens: longest answer, in tokens.

    Raises:
        CheckpointError: `run` holds neither a finished run nor an adapter.
        DataError: a picture can't be used.
        UnsupportedModel: the model is not known.
    """
    source = _source(run, model)
    config = source.config
    spec = resolve(config.model.name, config.model.revision)
    place = choose_place(config)
    loaded = load_model(config, spec, place.device, place.precision)
    if source.adapter is not None:
        loaded.model = PeftModel.from_pretrained(loaded.model, str(source.adapter))
    encoder = Encoder(loaded.processor, spec.family, max_length=config.data.max_length)
    parts: list[TextPart | ImagePart] = [ImagePart(path=path) for path in images]
    parts.append(TextPart(question.strip()))
    try:
        prompt = encoder.encode_prompt([Message("user", tuple(parts))])
    except SampleProblem as problem:
        raise DataError(
            problem.reason,
            expected="pictures that can be opened, and a question that fits data.max_length",
            next_step="check the path after --image, and that the file opens in an image viewer",
        ) from problem
    (answer,) = answer_prompts(
        loaded.model, encoder, [prompt], build_compute(config, place), max_new_tokens=max_new_tokens
    )
    return Prediction(answer, spec.name, source.adapter)


def _source(run: Path | None, model: str | None) -> _Source:
    if run is None:
        return _Source(TrainingConfig(model=ModelConfig(name=str(model))), None)
    if (run / ADAPTER_CONFIG).is_file():  # an adapter by itself, or the one inside a run
        return _Source(_with_model(_config_of_adapter(run), model), run)
    config = load_config(RunFolder.open(run).config).config
    if config.training.method is TrainingMethod.FULL:
        _check_is_there(run, run / FULL_MODEL_FOLDER / "config.json")
        return _Source(_with_model(config, str(run / FULL_MODEL_FOLDER)), None)
    _check_is_there(run, run / ADAPTER_FOLDER / ADAPTER_CONFIG)
    return _Source(_with_model(config, model), run / ADAPTER_FOLDER)


def _with_model(config: TrainingConfig, name: str | None) -> TrainingConfig:
    return config if name is None else config.model_copy(update={"model": ModelConfig(name=name)})


def _config_of_adapter(adapter: Path) -> TrainingConfig:
    """The settings of the run around `adapter`; without one, the defaults with the base model that it names."""
    run_config = RunFolder(adapter.absolute().parent).config
    if run_config.is_file():
        return load_config(run_config).config
    base = json.loads((adapter / ADAPTER_CONFIG).read_text(encoding="utf-8"))["base_model_name_or_path"]
    return TrainingConfig(model=ModelConfig(name=base))


def _check_is_there(run: Path, path: Path) -> None:
    if not path.is_file():
        raise CheckpointError(
            f"the run {run} has no result yet ({path} is missing)",
            expected="a run that was trained to its end",
            next_step=f"finish it with `eightgig train --resume {run}`",
        )
