"""Plans kept from call to call, found again without importing torch. All that could change a plan is in its key."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import eightgig
from eightgig.core.user_cache import JsonCache, cache_folder
from eightgig.memory.segments import expects_expandable_segments
from eightgig.registry import get, is_known
from eightgig.registry.lookup import PACKAGED_MODELS

if TYPE_CHECKING:
    from eightgig.config import TrainingConfig
    from eightgig.data.sets import ReadData
    from eightgig.registry.gpus import GpuFacts

MAX_PLANS = 200
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "tokenizers", "accelerate", "numpy", "pillow")


def plan_cache() -> JsonCache:
    """Where plans are kept."""
    return JsonCache(cache_folder() / "plans", MAX_PLANS)


def plan_key(
    config: TrainingConfig,
    *,
    gpu: GpuFacts | None,
    driver: str | None,
    reserve_bytes: int,
    read: ReadData | None,
    fixed: Iterable[str] | None = None,
) -> dict[str, Any] | None:
    """What a plan depends on, as plain data; None for a model that only the hub knows, which may change at any time.

    Args:
        config: the settings.
        gpu: the card, and of one that is in this machine the version of its `driver`.
        driver: None for a card that is only named.
        reserve_bytes: kept free.
        fixed: settings that stay in a search; None without one.
        read: the user's data; its files and images count with size and time of their last change.
    """
    name = config.model.name
    folder = Path(name).expanduser()
    if not is_known(name) and not folder.is_dir():
        return None
    return {
        "config": config.model_dump(mode="json"),
        "gpu": None if gpu is None else asdict(gpu),
        "driver": driver,
        "reserve_bytes": reserve_bytes,
        "fixed": None if fixed is None else sorted(fixed),
        "expandable_segments": expects_expandable_segments(),
        "versions": {package: _version(package) for package in PACKAGES},
        "sources": _digest(_own_files()),
        "model": None if is_known(name) else _digest(path for path in folder.iterdir() if path.is_file()),
        "hub": _hub_mark(name),
        "data": None if read is None else _digest(_data_files(read)),
        "working_folder": str(Path.cwd()),  # relative paths start there, and stand in the answer
    }


class _KeptPlan:
    """The place of one plan among those kept; none where `key` is None."""

    def __init__(self, key: dict[str, Any] | None) -> None:
        self._key = key

    def get(self) -> dict[str, Any] | None:
        """The plan that was kept, if any."""
        kept = None if self._key is None else plan_cache().get(self._key)
        return kept if isinstance(kept, dict) else None

    def put(self, planned: dict[str, Any]) -> None:
        """Keep `planned`."""
        if self._key is not None:
            plan_cache().put(self._key, planned)


def kept_training_plan(config: TrainingConfig, gpu: GpuFacts, reserve_bytes: int, read: ReadData) -> _KeptPlan:
    """Where the plan is kept that a run of `config` on `gpu` makes of itself; see `train.planning.KeptPlan`."""
    key = plan_key(config, gpu=gpu, driver=None, reserve_bytes=reserve_bytes, read=read)
    return _KeptPlan(None if key is None else {**key, "asked_by": "train"})


def _hub_mark(name: str) -> str | None:
    """Which copy of a registry model's repository is on this machine: with data, its tokenizer counts."""
    if name.strip().lower() in PACKAGED_MODELS or not is_known(name):
        return None
    from huggingface_hub import constants

    hub_id = get(name).facts.hub_id
    return None if hub_id is None else _digest(_refs(Path(constants.HF_HUB_CACHE), hub_id))


def _refs(hub_cache: Path, hub_id: str) -> Iterable[Path]:
    """The files that say which commits of a repository are there."""
    folder = hub_cache / f"models--{hub_id.replace('/', '--')}" / "refs"
    return folder.iterdir() if folder.is_dir() else ()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _own_files() -> Iterable[Path]:
    """EightGig's own modules and tables: whoever works on them never sees a plan of yesterday's."""
    root = Path(eightgig.__file__).parent
    yield from root.rglob("*.py")
    yield from root.rglob("*.json")


def _data_files(read: ReadData) -> Iterable[Path]:
    for read_set in (read.train, read.validation):
        if read_set is not None:
            yield from (file.path for file in read_set.manifest)
            yield from {part.path for sample in read_set.samples for part in sample.images if part.path is not None}


def _digest(paths: Iterable[Path]) -> str:
    """Of the files' paths, sizes and times of last change; one that is gone counts too."""
    digest = sha256()
    for path in sorted(paths):
        digest.update(f"{path.absolute()}\0{_mark(path)}\0".encode())
    return digest.hexdigest()


def _mark(path: Path) -> tuple[int, int] | None:
    try:
        facts = path.stat()
    except OSError:
        return None
    return facts.st_size, facts.st_mtime_ns
