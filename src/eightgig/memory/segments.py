"""How PyTorch's allocator takes memory from the driver: in segments that grow, where the system has them.

Segments of fixed size reserve 0.5 to 5.6 % more (docs/decisions/0005-planner.md), and the more the lengths of samples
differ, the more. Growing ones need the driver's virtual
memory calls, which PyTorch doesn't use on Windows, and WSL doesn't have.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Mapping

# Read by torch.cuda; the second is the name from torch 2.9 on, which that version itself ignores.
VARIABLE = "PYTORCH_CUDA_ALLOC_CONF"
NEW_VARIABLE = "PYTORCH_ALLOC_CONF"
_EXPANDABLE = "expandable_segments"


def prefer_expandable_segments() -> None:
    """Ask PyTorch for expandable segments where the system has them and the user has set nothing about its allocator.

    Call it before the first CUDA allocation: PyTorch reads the variable then.
    """
    if _has_system_expandable(sys.platform, platform.release()) and not _given(os.environ):
        os.environ[VARIABLE] = f"{_EXPANDABLE}:True"


def expects_expandable_segments(
    environment: Mapping[str, str] | None = None, system: str = sys.platform, release: str | None = None
) -> bool:
    """Whether a run started from here has expandable segments: as the user set it, else where the system has them.

    On a Mac, from which one can only plan, as on the Linux machine that will train.
    """
    environment = os.environ if environment is None else environment
    given = _given(environment)
    if given:
        options = dict(part.split(":", 1) for part in given.replace(" ", "").split(",") if ":" in part)
        return options.get(_EXPANDABLE, "False").lower() == "true"
    return _has_system_expandable(system, platform.release() if release is None else release)


def _given(environment: Mapping[str, str]) -> str:
    return environment.get(VARIABLE) or environment.get(NEW_VARIABLE) or ""


def _has_system_expandable(system: str, release: str) -> bool:
    return system != "win32" and "microsoft" not in release.lower()
