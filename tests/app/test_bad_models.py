"""Models that can't be had or can't be loaded, typed at the real command: names, folders, files, the hub."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants, errors
from tests.app.command_line import NOTHING, CommandLine, check_message


def copy_of_model(command: CommandLine, name: str, change: Callable[[Path], object]) -> str:
    """The name of a changed copy of the tiny model."""
    shutil.copytree(command.model, command.folder / name)
    change(command.folder / name)
    return name


def weights_of(model: Path) -> Path:
    return model / "model.safetensors"


def unknown_name(command: CommandLine) -> str:
    return "llava-1.5-7"


def folder_without_config(command: CommandLine) -> str:
    (command.folder / "m").mkdir()
    (command.folder / "m" / "README.md").touch()
    return "m"


def adapter_folder(command: CommandLine) -> str:
    (command.folder / "m").mkdir()
    (command.folder / "m" / "adapter_config.json").write_text('{"base_model_name_or_path": "llava-1.5-7b"}')
    return "m"


def other_architecture(command: CommandLine) -> str:
    def change(model: Path) -> None:
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | {"model_type": "blip-9"}))

    return copy_of_model(command, "m", change)


def cut_off_config(command: CommandLine) -> str:
    return copy_of_model(command, "m", lambda model: (model / "config.json").write_text('{"model_type": '))


def config_of_something_else(command: CommandLine) -> str:
    return copy_of_model(command, "m", lambda model: (model / "config.json").write_text("[]"))


def no_weights(command: CommandLine) -> str:
    return copy_of_model(command, "m", lambda model: weights_of(model).unlink())


def cut_off_weights(command: CommandLine) -> str:
    return copy_of_model(
        command, "m", lambda model: weights_of(model).write_bytes(weights_of(model).read_bytes()[:-99])
    )


def empty_weights(command: CommandLine) -> str:
    return copy_of_model(command, "m", lambda model: weights_of(model).write_bytes(b""))


def missing_shard(command: CommandLine) -> str:
    def change(model: Path) -> None:
        weights_of(model).rename(model / "model-00001-of-00002.safetensors")
        names = ("model.language_model.norm.weight", "lm_head.weight")
        shards = {name: f"model-0000{number}-of-00002.safetensors" for number, name in enumerate(names, 1)}
        index = {"metadata": {"total_size": 1}, "weight_map": shards}
        (model / "model.safetensors.index.json").write_text(json.dumps(index))

    return copy_of_model(command, "m", change)


def weights_of_another_size(command: CommandLine) -> str:
    def change(model: Path) -> None:
        config = json.loads((model / "config.json").read_text())
        config["text_config"]["intermediate_size"] = 192
        (model / "config.json").write_text(json.dumps(config))

    return copy_of_model(command, "m", change)


def tower_of_another_size(command: CommandLine) -> str:
    def change(model: Path) -> None:
        config = json.loads((model / "config.json").read_text())
        config["vision_config"]["hidden_size"] = 128
        (model / "config.json").write_text(json.dumps(config))

    return copy_of_model(command, "m", change)


def config_with_a_wrong_value(command: CommandLine) -> str:
    return copy_of_model(
        command, "m", lambda model: (model / "config.json").write_text('{"model_type": "llava", "vision_config": 5}')
    )


def cut_off_tokenizer_settings(command: CommandLine) -> str:
    return copy_of_model(command, "m", lambda model: (model / "tokenizer_config.json").write_text('{"x": '))


def missing_tokenizer(command: CommandLine) -> str:
    return copy_of_model(command, "m", lambda model: (model / "tokenizer.json").unlink())


def cut_off_tokenizer(command: CommandLine) -> str:
    return copy_of_model(command, "m", lambda model: (model / "tokenizer.json").write_text('{"version":'))


def a_file(command: CommandLine) -> str:
    (command.folder / "m.safetensors").touch()
    return "m.safetensors"


MODELS = {
    unknown_name: (5, ["no model is called 'llava-1.5-7'", "a hub id like", "did you mean llava-1.5-7b"]),
    folder_without_config: (5, ["m has no config.json (it holds README.md)", "give the folder that"]),
    adapter_folder: (5, ["m holds an adapter, not a model", "llava-1.5-7b", "give the base model here"]),
    other_architecture: (5, ["config.json says model_type 'blip-9'", "one of: ", "llava", "supported family"]),
    cut_off_config: (5, ["config.json is not JSON", "copy the model's folder again"]),
    config_of_something_else: (5, ["config.json is not JSON of a model: a list", "copy the model's folder again"]),
    a_file: (5, ["m.safetensors is a file", "give the folder that holds the file"]),
    missing_tokenizer: (5, ["m has no tokenizer (tokenizer.json or tokenizer.model)", "copy them from"]),
    cut_off_tokenizer: (7, ["tokenizer.json is damaged", "complete JSON", "copy the file again"]),
    no_weights: (5, ["m has a config.json but no weights", "model.safetensors", "--random-weights SEED"]),
    cut_off_weights: (7, ["a weights file of", "is damaged", "complete safetensors files", "cut off"]),
    empty_weights: (7, ["a weights file of", "is damaged", "cut off"]),
    missing_shard: (5, ["model-00002-of-00002.safetensors", "copy or download the model again"]),
    weights_of_another_size: (
        5,
        ["do not fit its config.json", "down_proj.weight has the shape (64, 128), not (64, 192)", "all from one place"],
    ),
    tower_of_another_size: (
        5,
        ["do not fit its config.json", "linear_1.weight has the shape (64, 64), not (64, 128)", "all from one place"],
    ),
    config_with_a_wrong_value: (5, ["config.json can't be read as that of a llava model", "vision_config"]),
    cut_off_tokenizer_settings: (7, ["tokenizer_config.json is damaged", "copy the file again"]),
}


@pytest.mark.parametrize("arrange", MODELS, ids=lambda arrange: arrange.__name__)
def test_a_model_that_can_not_be_loaded(eightgig: CommandLine, arrange: Callable[[CommandLine], str]) -> None:
    code, said = MODELS[arrange]
    name = arrange(eightgig)
    before = eightgig.listing()
    ended = eightgig.train("--model", name)
    check_message(ended, code, *said)
    assert eightgig.listing() - before - {"tiny.json"} == NOTHING


def test_weights_without_a_place_in_the_model_are_told(eightgig: CommandLine) -> None:
    def change(model: Path) -> None:
        config = json.loads((model / "config.json").read_text())
        config["text_config"]["num_hidden_layers"] = 1
        (model / "config.json").write_text(json.dumps(config))

    copy_of_model(eightgig, "m", change)
    ended = eightgig.train("--model", "m")
    assert ended.code == 0
    assert "9 weights of" in ended.err
    assert "have no place in the model: model.language_model.layers.1." in ended.err


def answer(kind: type[errors.HfHubHTTPError], status: int) -> Callable[..., Any]:
    def fail(*_: object, **__: object) -> None:
        response: Any = type("Response", (), {"headers": {}, "request": None, "status_code": status})()
        raise kind(f"{status} from the server", response=response)

    return fail


def unreachable(*_: object, **__: object) -> None:
    raise ConnectionError("Name or service not known")


HUB: dict[str, tuple[Callable[..., Any], int, list[str]]] = {
    "no network": (unreachable, 6, ["some/llava is not on this machine", "can't be reached", "set HF_ENDPOINT"]),
    "gated": (answer(errors.GatedRepoError, 403), 6, ["some/llava is gated", "hf auth login"]),
    "not found": (
        answer(errors.RepositoryNotFoundError, 404),
        5,
        ["there is no model some/llava", "check the spelling"],
    ),
    "private": (answer(errors.RepositoryNotFoundError, 401), 6, ["private, or does not exist", "HF_TOKEN"]),
    "hub down": (answer(errors.HfHubHTTPError, 503), 6, ["answered 503", "try again in some minutes"]),
}


@pytest.mark.parametrize("case", HUB)
@pytest.mark.parametrize("model", ["some/llava", "llava-1.5-7b"])
def test_a_hub_that_gives_no_model(
    eightgig: CommandLine, case: str, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail, code, said = HUB[case]
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(eightgig.folder / "no-cache"))
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", fail)
    hub_id = "llava-hf/llava-1.5-7b-hf" if model == "llava-1.5-7b" else model
    ended = eightgig.train("--model", model)
    check_message(ended, code, *[text.replace("some/llava", hub_id) for text in said])
    assert ended.new - {"tiny.json"} == NOTHING


# Settings that only the model can judge.
@pytest.mark.parametrize(
    ("setting", "said"),
    [
        (
            "data.image_size=33",
            ["data.image_size = 33", "a multiple of the patch size, 8 px", "use 32 or 40"],
        ),
        (
            "training.lora.target_modules=q_prj",
            ["training.lora.target_modules = q_prj", "matches no module", "q_proj", "or leave it out"],
        ),
    ],
)
def test_a_setting_that_the_model_can_not_take(eightgig: CommandLine, setting: str, said: list[str]) -> None:
    ended = eightgig.train("--set", setting)
    check_message(ended, 2, *said)
    assert ended.new - {"tiny.json"} == NOTHING


def _typed_without_offline_mode(arguments: list[str], folder: Path, **environment: str) -> tuple[int, str, float]:
    """Exit code, stderr and seconds of the real command in a process of its own, with a hub that refuses to talk."""
    kept = {name: value for name, value in os.environ.items() if name not in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")}
    # Port 9 ("discard") of this machine: nothing listens, so the connection is refused at once.
    hub = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(folder / "hub"), "NO_PROXY": "127.0.0.1"}
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "eightgig", *arguments],
        cwd=folder,
        env=kept | hub | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stderr, time.perf_counter() - started


def test_without_a_network_the_message_comes_soon_and_alone(tmp_path: Path, tiny_data: Path) -> None:
    code, err, seconds = _typed_without_offline_mode(["train", "full", "--data", str(tiny_data)], tmp_path)
    assert code == 6
    hub = "http://127.0.0.1:9"
    assert err.splitlines() == [
        f"error: llava-hf/llava-1.5-7b-hf is not on this machine, and {hub} (from HF_ENDPOINT) can't be reached",
        "  expected: a network connection to the hub",
        "  next: check the connection or the proxy (HTTPS_PROXY), unset HF_ENDPOINT or correct it, "
        "or give a local folder as model.name",
    ]
    assert seconds < 60  # five or so of imports; with the clients' own retries it took 144


def test_without_a_network_a_model_in_the_cache_is_used(tmp_path: Path, tiny_model: Path, tiny_data: Path) -> None:
    repository = tmp_path / "hub" / "hub" / "models--some--llava"
    shutil.copytree(tiny_model, repository / "snapshots" / ("a" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    code, err, seconds = _typed_without_offline_mode(
        ["train", "--data", str(tiny_data), "--model", "some/llava", "--set", "data.image_size=32", "--dry-run"],
        tmp_path,
    )
    assert code == 0, err
    assert "Retrying" not in err
    assert "adapters on 14 layers" in err
    assert seconds < 60
