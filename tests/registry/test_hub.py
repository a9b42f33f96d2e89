"""Each way in which a hub fails has its own message and next step."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants, errors

from eightgig import registry
from eightgig.config import ModelConfig, TrainingConfig
from eightgig.core.errors import DoesNotFit, EightGigError, EnvironmentProblem, UnsupportedModel
from eightgig.models.load import load_processor
from eightgig.registry import hub

HUB_ID = "somebody/some-llava"


def _answer(error_type: type[errors.HfHubHTTPError], status: int) -> errors.HfHubHTTPError:
    response: Any = SimpleNamespace(headers={}, request=None, status_code=status)
    return error_type(f"{status} from the server", response=response)


def _no_space() -> OSError:
    return OSError(errno.ENOSPC, "No space left on device")


CASES: dict[str, tuple[Callable[[], Exception], type[EightGigError], str]] = {
    "gated": (
        lambda: _answer(errors.GatedRepoError, 403),
        EnvironmentProblem,
        r"is gated[\s\S]*accept the terms at https://huggingface\.co/somebody/some-llava, then log in with `hf auth",
    ),
    "private": (
        lambda: _answer(errors.RepositoryNotFoundError, 401),
        EnvironmentProblem,
        r"private, or does not exist[\s\S]*HF_TOKEN",
    ),
    "not found": (
        lambda: _answer(errors.RepositoryNotFoundError, 404),
        UnsupportedModel,
        r"there is no model somebody/some-llava[\s\S]*check the spelling",
    ),
    "no revision": (
        lambda: _answer(errors.RevisionNotFoundError, 404),
        UnsupportedModel,
        r"has no revision 'v9'[\s\S]*leave model\.revision out",
    ),
    "no config": (
        lambda: _answer(errors.RemoteEntryNotFoundError, 404),
        UnsupportedModel,
        r"lacks a file[\s\S]*ends in -hf",
    ),
    "no network": (
        lambda: errors.LocalEntryNotFoundError("cannot find the file in the cache"),
        EnvironmentProblem,
        r"https://huggingface\.co can't be reached[\s\S]*set HF_ENDPOINT to a mirror",
    ),
    "no network at all": (
        lambda: ConnectionError("Name or service not known"),
        EnvironmentProblem,
        "can't be reached",
    ),
    "offline": (
        lambda: errors.OfflineModeIsEnabled("offline"),
        EnvironmentProblem,
        r"HF_HUB_OFFLINE is set[\s\S]*unset HF_HUB_OFFLINE",
    ),
    "plain 404": (
        lambda: _answer(errors.HfHubHTTPError, 404),
        UnsupportedModel,
        r"there is no model[\s\S]*HF_ENDPOINT",
    ),
    "forbidden": (lambda: _answer(errors.HfHubHTTPError, 403), EnvironmentProblem, r"refuses[\s\S]*hf auth login"),
    "server down": (lambda: _answer(errors.HfHubHTTPError, 503), EnvironmentProblem, r"answered 503[\s\S]*try again"),
    "no disk space": (_no_space, DoesNotFit, r"the disk filled up[\s\S]*HF_HOME"),
    "no id": (lambda: errors.HFValidationError("two slashes"), UnsupportedModel, r"is not a hub id: two slashes"),
}


ALIKE = ("no network at all", "plain 404")  # other signs of what another case shows


@pytest.fixture(autouse=True)
def _online(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_ENDPOINT", raising=False)


def _fail_with(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*args: object, **kwargs: object) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", fail)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)


@pytest.mark.parametrize("case", CASES)
def test_each_failure_has_its_own_message_and_next_step(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make_error, expected_type, message = CASES[case]
    _fail_with(monkeypatch, make_error())
    with pytest.raises(expected_type, match=message):
        registry.resolve(HUB_ID, revision="v9")


@pytest.mark.parametrize("case", CASES)
def test_an_error_that_transformers_wrapped_is_explained_the_same_way(case: str) -> None:
    make_error, expected_type, message = CASES[case]
    with pytest.raises(expected_type, match=message), hub.explained_hub_errors(HUB_ID, "v9"):
        raise OSError("We couldn't connect to the hub to load this file") from make_error()


def test_the_messages_differ_from_one_another(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [hub.explain(make_error(), HUB_ID, "v9") for name, (make_error, _, _) in CASES.items() if name not in ALIKE]
    assert None not in found
    assert len({error.found for error in found if error is not None}) == len(found)


def test_a_cache_miss_in_offline_mode_says_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    _fail_with(monkeypatch, errors.LocalEntryNotFoundError("not in the cache"))
    with pytest.raises(EnvironmentProblem, match="HF_HUB_OFFLINE is set"):
        registry.resolve(HUB_ID)


def test_a_mirror_that_is_set_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example/")
    _fail_with(monkeypatch, errors.LocalEntryNotFoundError("not in the cache"))
    with pytest.raises(
        EnvironmentProblem, match=r"https://mirror\.example \(from HF_ENDPOINT\)[\s\S]*unset HF_ENDPOINT"
    ):
        registry.resolve(HUB_ID)


def test_an_error_that_is_not_the_hubs_passes_unchanged() -> None:
    with pytest.raises(OSError, match="something else"), hub.explained_hub_errors(HUB_ID, None):
        raise OSError("something else")


def test_a_model_of_the_hub_is_resolved_by_its_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "config.json"
    path.write_text(
        json.dumps(
            {
                "model_type": "llava",
                "vision_config": {"model_type": "clip_vision_model", "image_size": 224, "patch_size": 16},
                "text_config": {"model_type": "mistral", "num_hidden_layers": 3},
            }
        )
    )
    asked: dict[str, Any] = {}

    def download(repo_id: str, filename: str, *, revision: str | None, local_files_only: bool) -> str:
        asked.update(repo_id=repo_id, filename=filename, revision=revision, local_files_only=local_files_only)
        return str(path)

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda url, timeout: None)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    spec = registry.resolve(HUB_ID, revision="v1")
    assert asked == {"repo_id": HUB_ID, "filename": "config.json", "revision": "v1", "local_files_only": False}
    assert (spec.location, spec.facts.image_px, spec.facts.num_language_linears) == (HUB_ID, 224, 21)


@pytest.mark.parametrize(("setting", "expected_s"), [(None, 5.0), ("30", 30.0)])
def test_the_hub_is_asked_once_and_not_for_long(
    setting: str | None, expected_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, float]] = []
    if setting is not None:
        monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", setting)
        monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", int(setting))
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda url, timeout: calls.append((url, timeout)))
    assert not hub.must_use_cache(HUB_ID, "v9")
    assert calls == [(f"{constants.ENDPOINT}/{HUB_ID}/resolve/v9/config.json", expected_s)]


@pytest.mark.parametrize("case", ["no network", "gated", "server down"])
def test_what_is_in_the_cache_is_used_when_the_hub_fails(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _fail_with(monkeypatch, CASES[case][0]())
    snapshot = tmp_path / "models--somebody--some-llava" / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert hub.must_use_cache(HUB_ID, None)
    with pytest.raises(EightGigError):
        hub.must_use_cache(HUB_ID, "another-branch")


def test_offline_mode_asks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    _fail_with(monkeypatch, AssertionError("the hub was asked"))
    assert hub.must_use_cache(HUB_ID, None)


def test_a_damaged_config_in_the_cache_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"model_type":')
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda url, timeout: None)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: str(path))
    with pytest.raises(
        UnsupportedModel, match=r"config\.json of somebody/some-llava is not JSON[\s\S]*delete .*config"
    ):
        registry.resolve(HUB_ID)


@pytest.mark.parametrize("name", [spec.name for spec in registry.all_specs() if spec.facts.hub_id is not None])
def test_a_processor_that_is_not_cached_says_offline(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    spec = registry.get(name)
    with pytest.raises(EnvironmentProblem, match=f"{spec.facts.hub_id} is not on this machine, and HF_HUB_OFFLINE"):
        load_processor(TrainingConfig(model=ModelConfig(name=name)), spec)
