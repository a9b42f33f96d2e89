"""What the driver counts for this process, with a stand-in for the driver."""

from __future__ import annotations

import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest
import torch

from eightgig.memory.device_use import DeviceUse, device_use, used_by_others

UUID = "1d2c0b5e-0000-0000-0000-00000000abcd"
OTHER = SimpleNamespace(pid=os.getpid() + 1, usedGpuMemory=700)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 8000))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=UUID))
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    asked: list[str] = []
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByUUID", lambda uuid: asked.append(uuid) or uuid)

    def show(processes: Any) -> None:
        def answer(handle: str) -> Any:
            assert handle == f"GPU-{UUID}"
            if isinstance(processes, Exception):
                raise processes
            return processes

        monkeypatch.setattr(pynvml, "nvmlDeviceGetComputeRunningProcesses", answer)

    return show


def test_it_counts_this_process_alone(driver: Callable[[Any], None]) -> None:
    driver([OTHER, SimpleNamespace(pid=os.getpid(), usedGpuMemory=6300)])
    assert device_use(torch.device("cuda")) == DeviceUse(6300, 8000, counts_other_programs=False)


@pytest.mark.parametrize(
    "processes",
    [
        [],
        [OTHER],  # a container whose process numbers are not the driver's
        [SimpleNamespace(pid=os.getpid(), usedGpuMemory=None)],  # Windows
        pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED),
    ],
)
def test_without_that_it_counts_the_whole_card_and_says_so(driver: Callable[[Any], None], processes: Any) -> None:
    driver(processes)
    assert device_use(torch.device("cuda")) == DeviceUse(7000, 8000, counts_other_programs=True)


def test_what_others_have_is_what_is_used_less_its_own(driver: Callable[[Any], None]) -> None:
    assert used_by_others(torch.device("cpu"), 500) == 0
    driver([OTHER, SimpleNamespace(pid=os.getpid(), usedGpuMemory=6300)])
    assert used_by_others(torch.device("cuda"), 500) == 700
    driver([OTHER])
    assert used_by_others(torch.device("cuda"), 500) == 6500
    assert used_by_others(torch.device("cuda"), 7500) == 0
