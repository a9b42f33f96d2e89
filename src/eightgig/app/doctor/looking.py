"""Gathering what the doctor knows: asks the system, the driver, PyTorch and the packages."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import pynvml
import torch
from packaging.requirements import Requirement as Wanted

from eightgig.app.doctor import trials
from eightgig.app.doctor.facts import DriverFacts, HubFacts, MachineFacts, Program, Requirement, TorchFacts
from eightgig.models.precision import has_native_bf16
from eightgig.registry import all_specs


def look(folder: Path) -> MachineFacts:
    """The facts of this machine, of which `folder` is where runs would be written. Takes some seconds."""
    seen = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if seen else torch.device("cpu")
    memory = psutil.virtual_memory()
    driver = _driver()  # before anything of ours is on the card
    return MachineFacts(
        system=f"{platform.system()} {platform.release()}",
        is_windows=platform.system() == "Windows",
        python=platform.python_version(),
        hidden_cards=os.environ.get("CUDA_VISIBLE_DEVICES"),
        requirements=tuple(_requirements()),
        driver=driver,
        torch=_torch(device),
        product=trials.try_product(device),
        ram_total_bytes=memory.total,
        ram_free_bytes=memory.available,
        pinned_bytes_per_s=trials.try_pinned(device),
        disk=trials.try_disk(folder),
        hub=_hub(),
    )


def _requirements() -> Iterator[Requirement]:
    for text in metadata.requires("eightgig") or ():
        wanted = Wanted(text)
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        try:
            installed = metadata.version(wanted.name)
        except metadata.PackageNotFoundError:
            yield Requirement(wanted.name, str(wanted.specifier), None, is_met=False)
            continue
        is_met = wanted.specifier.contains(installed, prereleases=True)
        yield Requirement(wanted.name, str(wanted.specifier), installed, is_met)


def _driver() -> DriverFacts | None:
    try:
        pynvml.nvmlInit()
        version = str(pynvml.nvmlSystemGetDriverVersion())
        newest = pynvml.nvmlSystemGetCudaDriverVersion_v2()
        cuda_version = newest // 1000, newest % 1000 // 10  # as cuda.h writes versions: 12080 is 12.8
        if not pynvml.nvmlDeviceGetCount():
            return DriverFacts(version, cuda_version)
        card = pynvml.nvmlDeviceGetHandleByIndex(0)
        memory = pynvml.nvmlDeviceGetMemoryInfo(card)
        name = str(pynvml.nvmlDeviceGetName(card))
    except pynvml.NVMLError:
        return None
    return DriverFacts(
        version,
        cuda_version,
        card=name,
        total_bytes=memory.total,
        free_bytes=memory.free,
        others=_programs(card),
        link_width=_asked(pynvml.nvmlDeviceGetCurrPcieLinkWidth, card),
        max_link_width=_asked(pynvml.nvmlDeviceGetMaxPcieLinkWidth, card),
    )


def _programs(card: Any) -> tuple[Program, ...]:
    """Programs that compute or draw on `card`, but for this one."""
    found: dict[int, Program] = {}
    for question in (pynvml.nvmlDeviceGetComputeRunningProcesses, pynvml.nvmlDeviceGetGraphicsRunningProcesses):
        for process in _asked(question, card) or ():
            if process.pid != os.getpid():
                found[process.pid] = Program(process.pid, _program_name(process.pid), process.usedGpuMemory)
    return tuple(found.values())


def _program_name(pid: int) -> str:
    try:
        return psutil.Process(pid).name()
    except psutil.Error:
        return "a program of another user or container"


def _asked(question: Callable[[Any], Any], card: Any) -> Any:
    """The driver's answer, None where it has none for this card."""
    try:
        return question(card)
    except pynvml.NVMLError:
        return None


def _torch(device: torch.device) -> TorchFacts:
    if device.type == "cpu":
        return TorchFacts(torch.__version__, torch.version.cuda, sees_card=False, has_bf16=has_native_bf16(device))
    properties = torch.cuda.get_device_properties(device)
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    return TorchFacts(
        torch.__version__,
        torch.version.cuda,
        sees_card=True,
        has_bf16=has_native_bf16(device),
        card=properties.name,
        capability=(properties.major, properties.minor),
        architectures=tuple(torch.cuda.get_arch_list()),
        total_bytes=total_bytes,
        free_bytes=free_bytes,
    )


def _hub() -> HubFacts:
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE)
    models = tuple(
        spec.facts.name
        for spec in all_specs()
        if spec.facts.hub_id and (folder / f"models--{spec.facts.hub_id.replace('/', '--')}").is_dir()
    )
    return HubFacts(folder, models, bool(constants.HF_HUB_OFFLINE))
