"""Reading from a model hub, with a message of its own for each way in which that fails."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eightgig.core.errors import DoesNotFit, EightGigError, EnvironmentProblem, UnsupportedModel

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

PUBLIC_HUB = "https://huggingface.co"
CONFIG = "config.json"
ANSWER_TIMEOUT_S = 5.0
HTTP_NOT_FOUND = 404
# How transformers words it, without a cause, where no file of a processor or tokenizer is in the cache (5.17 to 5.23).
TRANSFORMERS_MISSES = "Can't load "
LOGIN = "log in with `hf auth login` or set HF_TOKEN"


def endpoint() -> str:
    """The address of the hub in use: HF_ENDPOINT where it is set, else the public one."""
    return os.environ.get("HF_ENDPOINT", PUBLIC_HUB).rstrip("/")


def read_config(hub_id: str, revision: str | None) -> dict[str, Any]:
    """The model's `config.json`, from the local cache or downloaded.

    Raises:
        EnvironmentProblem: no network, offline mode, gated or private model.
        UnsupportedModel: there is no such model, revision or config.
        DoesNotFit: the disk is full.
    """
    import huggingface_hub

    with explained_hub_errors(hub_id, revision):
        only_cache = must_use_cache(hub_id, revision)
        path = huggingface_hub.hf_hub_download(hub_id, CONFIG, revision=revision, local_files_only=only_cache)
    try:
        config: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are both
        raise UnsupportedModel(
            f"the {CONFIG} of {hub_id} is not JSON: {error}",
            expected="the config.json that transformers' save_pretrained writes",
            next_step=f"delete {path} and run again, so that it is downloaded anew",
        ) from error
    return config


def must_use_cache(hub_id: str, revision: str | None) -> bool:
    """Whether the model must be taken from the local cache: offline mode, or the hub can't be reached but it is there.

    The clients retry each of a model's files for up to a minute. One request without retries tells in seconds, and
    also tells whether the model is there and handed out. HF_HUB_ETAG_TIMEOUT, where set, says how long it may take.

    Raises:
        EnvironmentProblem: it is not in the cache, and the hub can't be reached or does not hand it out.
        UnsupportedModel: it is not in the cache, and there is no such model or revision, or it has no config.
    """
    import huggingface_hub

    if _is_offline():
        return True
    with explained_hub_errors(hub_id, revision):
        url = huggingface_hub.hf_hub_url(hub_id, CONFIG, revision=revision)
        try:
            huggingface_hub.get_hf_file_metadata(url, timeout=_timeout_s())
        except (OSError, _http_error()):
            # What was handed out before may be used, whatever the hub says now; so does its own client.
            if isinstance(huggingface_hub.try_to_load_from_cache(hub_id, CONFIG, revision=revision), str):
                return True
            raise
    return False


def _timeout_s() -> float:
    """How long the hub may take to answer before it counts as out of reach."""
    from huggingface_hub import constants

    is_set = "HF_HUB_ETAG_TIMEOUT" in os.environ
    return float(constants.HF_HUB_ETAG_TIMEOUT) if is_set else ANSWER_TIMEOUT_S


def _http_error() -> type[Exception]:
    """The ancestor of all errors of the HTTP client: httpx's before version 2 of huggingface_hub, httpx2's now."""
    from huggingface_hub.errors import HfHubHTTPError

    return next(base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError")


@contextlib.contextmanager
def explained_hub_errors(hub_id: str, revision: str | None) -> Iterator[None]:
    """Turn whatever the hub's client raises in the block into an error that says what to do; other errors pass.

    transformers wraps the client's errors in OSError, so the chain of causes is searched.
    """
    from huggingface_hub.errors import HFValidationError

    try:
        yield
    except (OSError, HFValidationError, _http_error()) as error:
        explained = explain(error, hub_id, revision)
        if explained is None:
            raise
        raise explained from error


def explain(error: BaseException, hub_id: str, revision: str | None) -> EightGigError | None:
    """The error for a user behind `error` or one of its causes, or None where the hub has nothing to do with it."""
    cause: BaseException | None = error
    seen: set[int] = set()
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        explained = _explain_one(cause, hub_id, revision)
        if explained is not None:
            return explained
        cause = cause.__cause__ or cause.__context__
    return None


def _explain_one(error: BaseException, hub_id: str, revision: str | None) -> EightGigError | None:
    from huggingface_hub import errors

    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return _no_disk_space(hub_id)
    if isinstance(error, errors.LocalEntryNotFoundError):
        return _offline(hub_id) if _is_offline() else _no_network(hub_id)
    if isinstance(error, errors.HfHubHTTPError):
        return _explain_answer(error, hub_id, revision)
    if isinstance(error, errors.OfflineModeIsEnabled):
        return _offline(hub_id)
    if isinstance(error, errors.EntryNotFoundError):
        return _lacks_file(hub_id, error)
    if isinstance(error, errors.HFValidationError):
        return _not_an_id(hub_id, error)
    if isinstance(error, ConnectionError) or any(base.__name__ == "TransportError" for base in type(error).__mro__):
        return _no_network(hub_id)
    if isinstance(error, OSError) and str(error).startswith(TRANSFORMERS_MISSES) and _is_offline():
        return _offline(hub_id)
    return None


def _explain_answer(error: HfHubHTTPError, hub_id: str, revision: str | None) -> EightGigError:
    """What an answer of the hub means. The order matters: a gated model's error is also a "not found" one."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return _gated(hub_id)
    if isinstance(error, errors.RevisionNotFoundError):
        return _no_revision(hub_id, revision)
    if isinstance(error, errors.RepositoryNotFoundError):
        return _not_found(hub_id, error.response.status_code)
    if isinstance(error, errors.EntryNotFoundError):
        return _lacks_file(hub_id, error)
    return _http_problem(hub_id, error.response.status_code, _first_line(error))


def _no_revision(hub_id: str, revision: str | None) -> UnsupportedModel:
    return UnsupportedModel(
        f"{hub_id} has no revision {revision!r} at {endpoint()}",
        expected="a branch, tag or commit of that repository",
        next_step=f"look at {endpoint()}/{hub_id}/commits/main, or leave model.revision out",
    )


def _lacks_file(hub_id: str, error: BaseException) -> UnsupportedModel:
    return UnsupportedModel(
        f"{hub_id} at {endpoint()} lacks a file that a model needs: {_first_line(error)}",
        expected="a repository with config.json and safetensors in the transformers format",
        next_step="check the id; many models have a twin repository whose name ends in -hf",
    )


def _not_an_id(hub_id: str, error: BaseException) -> UnsupportedModel:
    return UnsupportedModel(
        f"{hub_id!r} is not a hub id: {_first_line(error)}",
        expected="a registry name, an existing folder, or an id like llava-hf/llava-1.5-7b-hf",
        next_step="correct model.name",
    )


def _no_disk_space(hub_id: str) -> DoesNotFit:
    from huggingface_hub import constants

    return DoesNotFit(
        f"the disk filled up while {hub_id} was being downloaded to {constants.HF_HUB_CACHE}",
        expected="room for the whole checkpoint (about 14 GB for a 7B model, 27 GB for a 13B model, in 16 bits)",
        next_step="free some space and run again (the download goes on), or set HF_HOME to a folder on a larger disk",
    )


def _gated(hub_id: str) -> EnvironmentProblem:
    return EnvironmentProblem(
        f"{hub_id} is gated: {endpoint()} hands it only to accounts that accepted its terms",
        expected="an account with access, and its token on this machine",
        next_step=f"accept the terms at {endpoint()}/{hub_id}, then {LOGIN}",
    )


def _not_found(hub_id: str, status: int) -> EightGigError:
    if status in (401, 403):
        return EnvironmentProblem(
            f"{hub_id} is private, or does not exist: {endpoint()} answered {status} without saying which",
            expected="a public model, or a token that may read it",
            next_step=f"check the spelling, then {LOGIN}",
        )
    return UnsupportedModel(
        f"there is no model {hub_id} at {endpoint()}",
        expected="the id of an existing repository, as OWNER/NAME",
        next_step="check the spelling of model.name, and HF_ENDPOINT if you set it",
    )


def _is_offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _offline(hub_id: str) -> EnvironmentProblem:
    return EnvironmentProblem(
        f"{hub_id} is not on this machine, and HF_HUB_OFFLINE is set, so it can't be downloaded",
        expected="the model in the local cache, or leave to download it",
        next_step="unset HF_HUB_OFFLINE, or give the folder of a copy as model.name",
    )


def _no_network(hub_id: str) -> EnvironmentProblem:
    is_mirror = "HF_ENDPOINT" in os.environ
    where = f"{endpoint()} (from HF_ENDPOINT)" if is_mirror else endpoint()
    other = "unset HF_ENDPOINT or correct it" if is_mirror else "set HF_ENDPOINT to a mirror that you can reach"
    return EnvironmentProblem(
        f"{hub_id} is not on this machine, and {where} can't be reached",
        expected="a network connection to the hub",
        next_step=f"check the connection or the proxy (HTTPS_PROXY), {other}, or give a local folder as model.name",
    )


def _http_problem(hub_id: str, status: int, message: str) -> EightGigError:
    if status in (401, 403):
        return EnvironmentProblem(
            f"{endpoint()} refuses {hub_id} with status {status}: {message}",
            expected="a token that may read the model",
            next_step=LOGIN,
        )
    if status == HTTP_NOT_FOUND:  # without the hub's own header that says what is missing: a mirror, or no hub at all
        return _not_found(hub_id, status)
    return EnvironmentProblem(
        f"{endpoint()} answered {status} when asked for {hub_id}: {message}",
        expected="status 200",
        next_step="try again in some minutes, or give a local folder as model.name",
    )


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
