"""docs/reference/plan_json.md names every key of a plan, and no other."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cli_events import ALTERNATIVE, PLAN
from tests.tiny import build_tiny_llava, write_llava_jsonl

from eightgig.app.card_wanted import CardWanted
from eightgig.app.planning import plan_as_json
from eightgig.config import ConfigPresets, TrainingConfig
from eightgig.plan import plan as plan_module
from eightgig.plan.plan import Alternative, Lever, PlannedTime

REFERENCE = Path(__file__).resolve().parents[2] / "docs" / "reference" / "plan_json.md"
OPEN = ("breakdown", "phases", "config", "alternatives[].settings")  # keys are categories, phases and settings


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A plan that has everything a plan can have; levers and time are put in where the planner gives none."""
    folder = tmp_path_factory.mktemp("plan")
    model = build_tiny_llava(folder / "model", image_px=32)
    config = ConfigPresets.ultra_low_memory(
        data_path=write_llava_jsonl(folder), overrides={"model.name": str(model), "data.image_size": 32}
    )
    real = plan_module.plan

    def complete(*positional: Any, **named: Any) -> Any:
        time = PlannedTime(2.0, None, 500.0, "estimated from the card's data sheet")
        made = real(*positional, **named)
        alternatives = (Alternative({"data.max_length": 64}, 1, 2.0, "c"),)
        return replace(made, levers=(Lever("a", 1, 0.1, "b"),), alternatives=alternatives, time=made.time or time)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan_module, "plan", complete)
        return plan_as_json(config, CardWanted(gpu="RTX 4060"), uses_cache=False)


def keys_of(value: Any, prefix: str = "") -> Iterator[str]:
    """The paths of all values in `value`, in the notation of the page."""
    if prefix in OPEN:
        yield f"{prefix}.*"
    elif isinstance(value, dict):
        for key, child in value.items():
            yield from keys_of(child, f"{prefix}.{key}" if prefix else key)
    elif isinstance(value, list):
        for child in value:
            yield from keys_of(child, f"{prefix}[]")
    else:
        yield prefix


def documented() -> list[str]:
    return re.findall(r"^\| `([^`]+)` \|", REFERENCE.read_text(encoding="utf-8"), re.MULTILINE)


def test_every_key_is_documented_and_every_documented_key_is_there(planned: dict[str, Any]) -> None:
    assert planned["workload"]["data"]["notes"] == []
    whole_groups = {"workload.data", "time", "workload.data.notes[]"}  # null, or empty here
    names = documented()
    assert len(names) == len(set(names))
    assert set(keys_of(planned)) == set(names) - whole_groups


def test_the_breakdown_adds_up_to_what_is_on_the_device(planned: dict[str, Any]) -> None:
    total = sum(planned["breakdown"].values())
    assert abs(total - planned["peak"]["device_bytes"]) <= 0.01 * planned["peak"]["device_bytes"]
    assert min(planned["breakdown"].values()) >= 0


def test_the_settings_of_a_plan_are_settings(planned: dict[str, Any]) -> None:
    assert TrainingConfig.model_validate(planned["config"]).model_dump(mode="json") == planned["config"]


def test_the_stand_in_of_the_other_tests_is_shaped_like_a_plan(planned: dict[str, Any]) -> None:
    stand_in = PLAN | {"alternatives": [ALTERNATIVE]}
    assert set(keys_of(stand_in)) == set(keys_of(planned)) | {"workload.data.notes[]"}
