"""`eightgig doctor`: each ailment a machine can have is named, with what to do; and this machine is examined."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch

from eightgig.app import doctor
from eightgig.app.doctor import State, trials
from eightgig.app.doctor.checks import findings
from eightgig.app.doctor.facts import (
    DiskFacts,
    DriverFacts,
    HubFacts,
    MachineFacts,
    ProductTrial,
    Program,
    Requirement,
    TorchFacts,
)
from eightgig.cli.entry import run_command
from eightgig.core.units import GIB, MIB

CARD = "NVIDIA GeForce RTX 4060"
DRIVER = DriverFacts("580.1", (13, 0), CARD, 8 * GIB, 7 * GIB, (), 8, 8)
TORCH = TorchFacts("2.13.0", "12.8", True, True, CARD, (8, 9), ("sm_80", "sm_86", "sm_90"), 8 * GIB, 7 * GIB)
WELL = MachineFacts(
    system="Linux 6.8",
    is_windows=False,
    python="3.12.1",
    hidden_cards=None,
    requirements=(Requirement("torch", ">=2.11", "2.13.0", is_met=True),),
    driver=DRIVER,
    torch=TORCH,
    product=ProductTrial("cuda:0", "bfloat16", 0.002, 0.03),
    ram_total_bytes=32 * GIB,
    ram_free_bytes=20 * GIB,
    pinned_bytes_per_s=12.5e9,
    disk=DiskFacts(Path("/runs"), 100 * GIB, 5e8),
    hub=HubFacts(Path("/hub"), ("llava-1.5-7b",), is_offline=False),
)
CPU_BUILD = TorchFacts("2.13.0+cpu", None, sees_card=False, has_bf16=False)
BLIND = TorchFacts("2.13.0", "12.8", sees_card=False, has_bf16=False)


def of(facts: MachineFacts, name: str) -> doctor.Finding:
    """The finding about `name`."""
    (finding,) = (each for each in findings(facts) if each.name == name)
    return finding


def test_a_machine_that_ails_nothing() -> None:
    found = findings(WELL)
    assert {each.state for each in found} == {State.FINE}
    assert [each.name for each in found] == [
        "system",
        "packages",
        "graphics card",
        "card's memory",
        "PCIe",
        "pinned memory",
        "bf16",
        "4-bit product",
        "RAM",
        "disk",
        "model hub",
    ]
    assert not any(each.todo for each in found)


AILMENTS: list[tuple[str, dict[str, Any], str, State, str, str]] = [
    (
        "a package is missing, another too old",
        {
            "requirements": (
                Requirement("peft", ">=0.21", None, is_met=False),
                Requirement("torch", ">=2.11", "2.5.0", is_met=False),
                Requirement("rich", ">=14", "15.0.0", is_met=True),
            )
        },
        "packages",
        State.PROBLEM,
        "peft missing (needed: >=0.21); torch 2.5.0 (needed: >=2.11)",
        "python -m pip install 'peft>=0.21' 'torch>=2.11'",
    ),
    ("no driver", {"driver": None, "torch": CPU_BUILD}, "graphics card", State.NOTE, "no NVIDIA driver", "planning"),
    (
        "a driver, and no card",
        {"driver": DriverFacts("580.1", (13, 0)), "torch": BLIND},
        "graphics card",
        State.PROBLEM,
        "driver 580.1 sees no card",
        "--gpus all",
    ),
    (
        "PyTorch without CUDA",
        {"torch": CPU_BUILD},
        "graphics card",
        State.PROBLEM,
        "2.13.0+cpu is a build without CUDA",
        "install a CUDA build of PyTorch",
    ),
    (
        "a hidden card",
        {"torch": BLIND, "hidden_cards": ""},
        "graphics card",
        State.PROBLEM,
        "hidden from PyTorch by CUDA_VISIBLE_DEVICES=''",
        "unset CUDA_VISIBLE_DEVICES",
    ),
    (
        "a driver too old for PyTorch",
        {"torch": BLIND, "driver": dataclasses.replace(DRIVER, version="470.1", cuda_version=(11, 4))},
        "graphics card",
        State.PROBLEM,
        "driver 470.1 serves CUDA up to 11.4 and PyTorch 2.13.0 needs 12.8",
        "newer driver",
    ),
    ("a card that is stuck", {"torch": BLIND}, "graphics card", State.PROBLEM, "can't use it", "restart the machine"),
    (
        "no kernels for the card",
        {"torch": dataclasses.replace(TORCH, capability=(12, 0))},
        "graphics card",
        State.PROBLEM,
        "kernels for sm_80, sm_86, sm_90 only",
        "a build of PyTorch with sm_120",
    ),
    (
        "other programs on the card",
        {
            "driver": dataclasses.replace(
                DRIVER,
                free_bytes=5 * GIB,
                others=tuple(Program(pid, f"game{pid}", size) for pid, size in enumerate((GIB, None, MIB, MIB))),
            )
        },
        "card's memory",
        State.WARNING,
        "5.00 GiB of 8.00 GiB free; also on it: game0 (0, 1.00 GiB), game1 (1), game2 (2, 1.00 MiB) and 1 more",
        "close what you don't need",
    ),
    ("Windows", {"is_windows": True}, "memory spill", State.NOTE, "without a word", "Prefer No Sysmem Fallback"),
    ("half the lanes", {"driver": dataclasses.replace(DRIVER, link_width=4)}, "PCIe", State.WARNING, "4 of 8", "slot"),
    (
        "a link that is not told",
        {"driver": dataclasses.replace(DRIVER, link_width=None)},
        "PCIe",
        State.NOTE,
        "does not tell",
        "",
    ),
    ("nothing can be pinned", {"pinned_bytes_per_s": None}, "pinned memory", State.WARNING, "can't be", "ulimit -l"),
    (
        "a card without bf16",
        {"torch": dataclasses.replace(TORCH, has_bf16=False)},
        "bf16",
        State.NOTE,
        "this card has none",
        "fp16",
    ),
    (
        "a processor without bf16",
        {"torch": CPU_BUILD, "driver": None},
        "bf16",
        State.NOTE,
        "this processor has none",
        "fp32",
    ),
    (
        "a 4-bit product that is wrong",
        {"product": ProductTrial("cuda:0", "bfloat16", 0.4, 0.03)},
        "4-bit product",
        State.PROBLEM,
        "4.0e-01 off the definition (rounding explains 3.0e-02)",
        "python -m bitsandbytes",
    ),
    (
        "a 4-bit product that is no number",
        {"product": ProductTrial("cuda:0", "bfloat16", math.nan, 0.03)},
        "4-bit product",
        State.PROBLEM,
        "nan",
        "python -m bitsandbytes",
    ),
    (
        "no 4-bit kernels",
        {"product": ProductTrial("cuda:0", "bfloat16", None, 0.03, "RuntimeError: no kernel image")},
        "4-bit product",
        State.PROBLEM,
        "RuntimeError: no kernel image",
        "--force-reinstall bitsandbytes",
    ),
    ("little RAM", {"ram_free_bytes": 3 * GIB}, "RAM", State.WARNING, "3.00 GiB of 32.00 GiB free", "close other"),
    (
        "a full disk",
        {"disk": DiskFacts(Path("/runs"), 0, None, "No space left on device")},
        "disk",
        State.PROBLEM,
        "/runs can't be written to: No space left on device",
        "--run-folder",
    ),
    (
        "no network wanted",
        {"hub": HubFacts(Path("/hub"), (), is_offline=True)},
        "model hub",
        State.NOTE,
        "no model of the registry in /hub; HF_HUB_OFFLINE is set",
        "unset",
    ),
]


@pytest.mark.parametrize(
    ("changes", "name", "state", "found", "todo"), [a[1:] for a in AILMENTS], ids=[a[0] for a in AILMENTS]
)
def test_an_ailment_is_named(changes: dict[str, Any], name: str, state: State, found: str, todo: str) -> None:
    facts = dataclasses.replace(WELL, **changes)
    finding = of(facts, name)
    assert finding.state is state
    assert found in finding.found
    assert todo in finding.todo
    assert bool(todo) == bool(finding.todo)
    well = {each.name for each in findings(facts) if each.state is not State.PROBLEM}
    assert (name in well) == (state is not State.PROBLEM)


@pytest.mark.parametrize(
    ("capability", "architectures", "has"),
    [
        ((8, 9), ("sm_86",), True),  # binary code of an earlier minor version
        ((8, 0), ("sm_86",), False),
        ((9, 0), ("sm_86",), False),
        ((12, 0), ("sm_86", "compute_90"), True),  # PTX is compiled for any later card
        ((8, 6), ("compute_90",), False),
        ((9, 0), ("sm_90a",), True),
        ((7, 5), ("sm_75", "sm_120"), True),
        ((12, 1), ("sm_75", "sm_120"), True),
    ],
)
def test_whether_there_are_kernels_for_a_card(
    capability: tuple[int, int], architectures: tuple[str, ...], has: bool
) -> None:
    torch_facts = dataclasses.replace(TORCH, capability=capability, architectures=architectures)
    finding = of(dataclasses.replace(WELL, torch=torch_facts), "graphics card")
    assert (finding.state is State.FINE) == has


def test_the_smaller_of_what_driver_and_cuda_say_is_free() -> None:
    for driver_gib, cuda_gib in ((3, 5), (5, 3)):
        facts = dataclasses.replace(
            WELL,
            driver=dataclasses.replace(DRIVER, free_bytes=driver_gib * GIB),
            torch=dataclasses.replace(TORCH, free_bytes=cuda_gib * GIB),
        )
        assert of(facts, "card's memory").found.startswith("3.00 GiB of 8.00 GiB")


def test_the_product_of_this_machine_is_right() -> None:
    trial = trials.try_product(torch.device("cpu"))
    assert trial.relative_error is not None
    assert trial.relative_error <= trial.bound
    assert trial.dtype == "float32"


def test_a_wrong_product_and_a_broken_kernel_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = bitsandbytes.matmul_4bit
    monkeypatch.setattr(bitsandbytes, "matmul_4bit", lambda *args, **kwargs: honest(*args, **kwargs) * 1.001)
    trial = trials.try_product(torch.device("cpu"))
    assert trial.relative_error == pytest.approx(0.001, rel=0.01)
    assert of(dataclasses.replace(WELL, product=trial), "4-bit product").state is State.PROBLEM

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no kernel image is available\nCUDA kernel errors might be asynchronous")

    monkeypatch.setattr(bitsandbytes, "matmul_4bit", broken)
    trial = trials.try_product(torch.device("cpu"))
    assert (trial.relative_error, trial.failure) == (None, "RuntimeError: no kernel image is available")


def test_the_disk_is_tried_and_left_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = trials.try_disk(tmp_path)
    assert tried.write_bytes_per_s is not None
    assert tried.write_bytes_per_s > 0
    assert tried.free_bytes > 0
    missing = trials.try_disk(tmp_path / "nowhere")
    assert (missing.write_bytes_per_s, missing.failure) == (None, os.strerror(errno.ENOENT))

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(trials.os, "fsync", full)
    assert trials.try_disk(tmp_path).failure == "No space left on device"
    assert list(tmp_path.iterdir()) == []


def test_this_machine_is_examined_and_told_in_80_columns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_command(["doctor", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    by_name = {each["name"]: each for each in told["findings"]}
    assert told["well"]
    assert by_name["packages"]["state"] == "fine"
    assert by_name["4-bit product"]["state"] == "fine"
    assert str(tmp_path) in by_name["disk"]["found"]
    if not torch.cuda.is_available():
        assert "the demonstration" in by_name["graphics card"]["todo"]

    assert run_command(["doctor", "--folder", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "nothing is in the way"
    assert all(len(line) <= 80 or " " not in line.strip() for line in lines)


def test_a_problem_is_told_and_sets_the_exit_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "look", lambda folder: dataclasses.replace(WELL, torch=CPU_BUILD))
    assert run_command(["doctor"]) == 6
    out, err = capsys.readouterr()
    assert "problem  graphics card" in out
    assert "in the way: graphics card" in out.splitlines()[-1]
    assert err == ""
    assert run_command(["doctor", "--json"]) == 6
    assert json.loads(capsys.readouterr().out)["well"] is False
