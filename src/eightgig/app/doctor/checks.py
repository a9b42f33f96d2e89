"""From what is known about a machine to findings. Looks at nothing itself."""

from __future__ import annotations

from collections.abc import Iterator

from eightgig.app.doctor.facts import DriverFacts, MachineFacts, Program
from eightgig.app.doctor.finding import Finding, State
from eightgig.core.units import GIB, format_bytes
from eightgig.registry.gpus import RESERVE_GIB

INSTALL_CUDA_BUILD = "install a CUDA build of PyTorch: https://pytorch.org/get-started/locally"
WITHOUT_CARD = (
    "planning for any card, checking data, the demonstration and training of small models work; "
    "a 7B model needs an NVIDIA card"
)
SHOWN_PROGRAMS = 3


def findings(facts: MachineFacts) -> list[Finding]:
    """What to say about the machine with `facts`, in the order in which things build on each other."""
    return [
        Finding("system", State.FINE, f"{facts.system}, Python {facts.python}"),
        _packages(facts),
        _card(facts),
        *_of_card(facts),
        _bf16(facts),
        _product(facts),
        _ram(facts),
        _disk(facts),
        _hub(facts),
    ]


def _packages(facts: MachineFacts) -> Finding:
    unmet = [each for each in facts.requirements if not each.is_met]
    if not unmet:
        return Finding("packages", State.FINE, f"all {len(facts.requirements)} in the versions that are needed")
    found = "; ".join(f"{each.name} {each.installed or 'missing'} (needed: {each.wanted})" for each in unmet)
    wanted = " ".join(f"'{each.name}{each.wanted}'" for each in unmet)
    return Finding("packages", State.PROBLEM, found, f"python -m pip install {wanted}")


def _card(facts: MachineFacts) -> Finding:
    """Whether PyTorch can compute on a card, and if not, which part of the chain is broken."""
    driver, torch = facts.driver, facts.torch
    if torch.sees_card:
        return _kernels(facts)
    if driver is None:
        return Finding("graphics card", State.NOTE, "no NVIDIA driver, and so no card to compute on", WITHOUT_CARD)
    if driver.card is None:
        todo = "check that the card sits in its slot and has power; in a container, that it is passed in (--gpus all)"
        return Finding("graphics card", State.PROBLEM, f"driver {driver.version} sees no card", todo)
    if torch.cuda_version is None:
        found = f"{driver.card}, but PyTorch {torch.version} is a build without CUDA"
        return Finding("graphics card", State.PROBLEM, found, INSTALL_CUDA_BUILD)
    if facts.hidden_cards is not None:
        found = f"{driver.card}, hidden from PyTorch by CUDA_VISIBLE_DEVICES={facts.hidden_cards!r}"
        return Finding("graphics card", State.PROBLEM, found, "unset CUDA_VISIBLE_DEVICES")
    if _major(torch.cuda_version) > driver.cuda_version[0]:
        found = (
            f"{driver.card}, but driver {driver.version} serves CUDA up to {_dotted(driver.cuda_version)} and PyTorch "
            f"{torch.version} needs {torch.cuda_version}"
        )
        return Finding("graphics card", State.PROBLEM, found, "install a newer driver from nvidia.com/drivers")
    found = f"{driver.card} with driver {driver.version}, but PyTorch {torch.version} can't use it"
    todo = "restart the machine; `python -c 'import torch; torch.zeros(1).cuda()'` says what CUDA reports"
    return Finding("graphics card", State.PROBLEM, found, todo)


def _kernels(facts: MachineFacts) -> Finding:
    torch = facts.torch
    found = f"{torch.card}, compute capability {_dotted(torch.capability)}, CUDA {torch.cuda_version}"
    if facts.driver is not None:
        found += f", driver {facts.driver.version}"
    if not _has_kernels(torch.capability, torch.architectures):
        found += f"; PyTorch has kernels for {', '.join(torch.architectures)} only"
        todo = f"install a build of PyTorch with sm_{torch.capability[0]}{torch.capability[1]}"
        return Finding("graphics card", State.PROBLEM, found, todo)
    return Finding("graphics card", State.FINE, found)


def _has_kernels(capability: tuple[int, int], architectures: tuple[str, ...]) -> bool:
    """Whether a build for `architectures` runs on a card of `capability`.

    Binary code runs on later minor versions of its major one; PTX ("compute_90") is compiled for any later card
    (CUDA C++ Programming Guide, "Binary Compatibility", "PTX Compatibility").
    """
    for name in architectures:
        kind, _, digits = name.partition("_")
        number = "".join(filter(str.isdigit, digits))  # sm_90a is sm_90 with what only that one has
        built = int(number[:-1]), int(number[-1])
        if kind == "compute" and capability >= built:
            return True
        if capability[0] == built[0] and capability[1] >= built[1]:
            return True
    return False


def _of_card(facts: MachineFacts) -> Iterator[Finding]:
    """What there is to say about a card that PyTorch computes on."""
    if not facts.torch.sees_card:
        return
    yield _memory(facts)
    if facts.is_windows:
        yield Finding(
            "memory spill",
            State.NOTE,
            "on Windows the driver moves what does not fit to RAM without a word, and steps take many times longer",
            "in the NVIDIA Control Panel set 'CUDA - Sysmem Fallback Policy' to 'Prefer No Sysmem Fallback'",
        )
    if facts.driver is not None and facts.driver.card is not None:
        yield _link(facts.driver)
    yield _pinned(facts)


def _memory(facts: MachineFacts) -> Finding:
    """The smaller of what driver and CUDA say is free."""
    torch, driver = facts.torch, facts.driver
    has_driver = driver is not None and driver.card == torch.card
    free_bytes = min(torch.free_bytes, driver.free_bytes) if driver is not None and has_driver else torch.free_bytes
    found = f"{format_bytes(free_bytes)} of {format_bytes(torch.total_bytes)} free"
    others = driver.others if driver is not None and has_driver else ()
    taken_bytes = sum(each.used_bytes or 0 for each in others)
    if others:
        found += f"; also on it: {', '.join(map(_shown, others[:SHOWN_PROGRAMS]))}"
        if len(others) > SHOWN_PROGRAMS:
            found += f" and {len(others) - SHOWN_PROGRAMS} more"
    if taken_bytes > RESERVE_GIB * GIB:
        return Finding(
            "card's memory", State.WARNING, found, "close what you don't need before a run that fits tightly"
        )
    return Finding("card's memory", State.FINE, found)


def _shown(program: Program) -> str:
    size = "" if program.used_bytes is None else f", {format_bytes(program.used_bytes)}"
    return f"{program.name} ({program.pid}{size})"


def _link(driver: DriverFacts) -> Finding:
    width, most = driver.link_width, driver.max_link_width
    if width is None or most is None:
        return Finding("PCIe", State.NOTE, "the driver does not tell the link's width")
    if width < most:
        todo = "put the card into the slot nearest to the processor, if weights or layer inputs are to wait in RAM"
        return Finding("PCIe", State.WARNING, f"{width} of {most} lanes in use", todo)
    return Finding("PCIe", State.FINE, f"{width} lanes")


def _pinned(facts: MachineFacts) -> Finding:
    if facts.pinned_bytes_per_s is None:
        todo = "give the machine or container more memory that may be locked (ulimit -l); else offloading is slow"
        return Finding("pinned memory", State.WARNING, "memory can't be pinned", todo)
    return Finding("pinned memory", State.FINE, f"{facts.pinned_bytes_per_s / 1e9:.1f} GB/s to the card")


def _bf16(facts: MachineFacts) -> Finding:
    if facts.torch.has_bf16:
        return Finding("bf16", State.FINE, "computed natively")
    if facts.torch.sees_card:
        found = "this card has none of its own (Ampere and later have)"
        return Finding("bf16", State.NOTE, found, "nothing: runs compute in fp16 and say so")
    return Finding("bf16", State.NOTE, "this processor has none of its own", "nothing: runs compute in fp32 and say so")


def _product(facts: MachineFacts) -> Finding:
    trial = facts.product
    where = f"NF4 with double quantisation, {trial.dtype} on {trial.device}"
    todo = "python -m pip install --force-reinstall bitsandbytes; `python -m bitsandbytes` says what it finds"
    if trial.relative_error is None:
        return Finding("4-bit product", State.PROBLEM, f"{where}: {trial.failure}", todo)
    found = f"{where}: {trial.relative_error:.1e} off the definition (rounding explains {trial.bound:.1e})"
    is_right = trial.relative_error <= trial.bound  # NaN is not
    return (
        Finding("4-bit product", State.FINE, found)
        if is_right
        else Finding("4-bit product", State.PROBLEM, found, todo)
    )


def _ram(facts: MachineFacts) -> Finding:
    found = f"{format_bytes(facts.ram_free_bytes)} of {format_bytes(facts.ram_total_bytes)} free"
    if facts.torch.sees_card and facts.ram_free_bytes < facts.torch.total_bytes:
        todo = "close other programs: what does not fit the card waits in RAM, up to as much again as the card has"
        return Finding("RAM", State.WARNING, found, todo)
    return Finding("RAM", State.FINE, found)


def _disk(facts: MachineFacts) -> Finding:
    disk = facts.disk
    if disk.write_bytes_per_s is None:
        todo = "start where you may write and where there is room, or give `eightgig train --run-folder`"
        return Finding("disk", State.PROBLEM, f"{disk.folder} can't be written to: {disk.failure}", todo)
    found = (
        f"{format_bytes(disk.free_bytes)} free at {disk.folder}, written at {disk.write_bytes_per_s / 1e6:,.0f} MB/s"
    )
    return Finding("disk", State.FINE, found)


def _hub(facts: MachineFacts) -> Finding:
    hub = facts.hub
    models = ", ".join(hub.models) if hub.models else "no model of the registry"
    found = f"{models} in {hub.folder}"
    if hub.is_offline:
        todo = "unset HF_HUB_OFFLINE to download others"
        return Finding("model hub", State.NOTE, f"{found}; HF_HUB_OFFLINE is set", todo)
    return Finding("model hub", State.FINE, found)


def _major(version: str) -> int:
    return int(version.split(".")[0])


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"
