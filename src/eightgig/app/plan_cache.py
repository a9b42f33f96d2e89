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
from eightgig.registry import is_known

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
    config: TrainingConfig, *, gpu: GpuFacts | None, driver: str | None, reserve_bytes: int, read: ReadData | None
) -> dict[str, Any] | None:
    """What a plan depends on, as plain data; None for a model at the hub, which may change at any time.

    Args:
        config: the settings.
        gpu: the card, and of one that is in this machine the version of its `driver`.
        driver: None for a card that is only named.
        reserve_bytes: kept free.
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
        "versions": {package: _version(package) for package in PACKAGES},
        "sources": _digest(_own_files()),
        "model": None if is_known(name) else _digest(path for path in folder.iterdir() if path.is_file()),
        "data": None if read is None else _digest(_data_files(read)),
        "working_folder": str(Path.cwd()),  # relative paths start there, and stand in the answer
    }


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
