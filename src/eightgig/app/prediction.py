"""`eightgig predict`: an answer to a question about pictures."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors import SafetensorError

from eightgig.config import ModelConfig, TrainingConfig, TrainingMethod, load_config
from eightgig.core.errors import CheckpointError, DataError, UnsupportedModel
from eightgig.data.encode import Encoder
from eightgig.data.images import check_image
from eightgig.data.quarantine import SampleProblem
from eightgig.data.sample import ImagePart, Message, TextPart
from eightgig.evaluate.generate import answer_prompts
from eightgig.models.load import load_model
from eightgig.models.trainable import ADAPTER_FOLDER
from eightgig.registry import resolve
from eightgig.step.build import build_compute
from eightgig.train.run_folder import RunFolder
from eightgig.train.setup import choose_place

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
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
        CheckpointError: `run` holds neither a finished run nor an adapter, or the adapter is damaged.
        DataError: a picture can't be used, or the question is blank or too long.
        UnsupportedModel: the model is not known, or not the one that the adapter was made for.
    """
    message = _message(question, images)  # what may be wrong with it is known at once, a model takes minutes to load
    source = _source(run, model)
    config = source.config
    spec = resolve(config.model.name, config.model.revision)
    place = choose_place(config)
    loaded = load_model(config, spec, place.device, place.precision)
    if source.adapter is not None:
        loaded.model = _with_adapter(loaded.model, spec.name, source.adapter)
    encoder = Encoder(loaded.processor, spec.family, max_length=config.data.max_length)
    with _explained_problems():
        prompt = encoder.encode_prompt([message])
    if prompt.num_cut_prompt_tokens:
        raise DataError(
            f"the question is {prompt.num_cut_prompt_tokens} tokens too long",
            expected=f"at most data.max_length = {config.data.max_length} text tokens, as in the model's training",
            next_step="ask in fewer words",
        )
    (answer,) = answer_prompts(
        loaded.model,
        encoder,
        [prompt],
        build_compute(config, place.device, place.precision),
        max_new_tokens=max_new_tokens,
    )
    return Prediction(answer, spec.name, source.adapter)


def _message(question: str, images: Sequence[Path]) -> Message:
    """The user's turn, its pictures found whole."""
    if not question.strip():
        raise DataError(
            "the question is blank",
            expected="something to ask about the pictures",
            next_step="write it behind --question, in quotes",
        )
    parts = [ImagePart(path=path) for path in images]
    with _explained_problems():
        for part in parts:
            check_image(part)
    return Message("user", (*parts, TextPart(question.strip())))


@contextlib.contextmanager
def _explained_problems() -> Iterator[None]:
    try:
        yield
    except SampleProblem as problem:
        raise DataError(
            problem.reason,
            expected="pictures that can be opened, and a question that the model's chat template takes",
            next_step="check the path after --image, and that the file opens in an image viewer",
        ) from problem


def _source(run: Path | None, model: str | None) -> _Source:
    if run is None:
        return _Source(TrainingConfig(model=ModelConfig(name=str(model))), None)
    if (run / ADAPTER_CONFIG).is_file():  # an adapter by itself, or the one inside a run
        return _Source(_with_model(_config_of_adapter(run), model), run)
    folder = RunFolder(run)
    if not folder.is_run:
        raise CheckpointError(
            f"{run} holds neither a run nor an adapter" if run.exists() else f"there is no folder {run}",
            expected="a folder that `eightgig train` made, or the folder of an adapter",
            next_step="give the folder that the run printed at its end; a model as it is goes behind --model",
        )
    config = load_config(folder.config).config
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
    path = adapter / ADAPTER_CONFIG
    try:
        base = json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError) as error:  # no JSON, no such key, no object
        raise _damaged_adapter(path, f"{type(error).__name__}: {error}") from error
    return TrainingConfig(model=ModelConfig(name=base))


def _with_adapter(model: Any, model_name: str, adapter: Path) -> PeftModel:
    """`model` with the adapter in the folder `adapter` on it. Raises CheckpointError or UnsupportedModel."""
    if not (adapter / ADAPTER_WEIGHTS).is_file():  # PEFT would look for it at the hub
        raise _damaged_adapter(adapter / ADAPTER_WEIGHTS, "it is missing")
    try:
        return PeftModel.from_pretrained(model, str(adapter))
    except SafetensorError as error:
        raise _damaged_adapter(adapter / ADAPTER_WEIGHTS, str(error)) from error
    except (RuntimeError, ValueError) as error:  # shapes that differ; layers that are not there
        raise UnsupportedModel(
            f"the adapter {adapter} does not fit the model {model_name}: {str(error).splitlines()[0]}",
            expected="the model that the adapter was trained on",
            next_step="leave --model out, or give that model",
        ) from error


def _damaged_adapter(path: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"the adapter file {path} can't be used: {what}",
        expected=f"{ADAPTER_CONFIG} and {ADAPTER_WEIGHTS}, as a run or PEFT writes them",
        next_step="copy the adapter's folder again",
    )


def _check_is_there(run: Path, path: Path) -> None:
    if not path.is_file():
        raise CheckpointError(
            f"the run {run} has no result yet ({path} is missing)",
            expected="a run that was trained to its end",
            next_step=f"finish it with `eightgig train --resume {run}`",
        )
