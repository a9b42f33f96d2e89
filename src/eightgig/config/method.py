"""Telling the training method from the other settings, and them from the method.

4-bit weights mean QLoRA, LoRA on 16-bit weights LoRA, neither full fine-tuning. What the user left open follows from
what the user said; what contradicts itself is reported, never repaired.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from eightgig.config.clash import Clash
from eightgig.config.enums import TrainingMethod

METHOD_PATH = "training.method"
LOAD_IN_4BIT_PATH = "training.quantization.load_in_4bit"
LORA_PATH = "training.lora"


def complete(values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` of the training section with `method`, `lora` and `load_in_4bit` filled in where they were left open.

    Values of a wrong type pass through untouched, for the fields' own checks to report.
    """
    completed = dict(values)
    method = _as_method(values.get("method"))
    load_in_4bit = _given_load_in_4bit(values.get("quantization"))
    wants_lora = values["lora"] is not None if "lora" in values else None

    if method is None and "method" not in values:
        method = _derive(load_in_4bit, wants_lora)
        completed["method"] = method
    if load_in_4bit is None and method is not None:
        completed["quantization"] = _with_load_in_4bit(values.get("quantization", {}), method is TrainingMethod.QLORA)
    if wants_lora is None and method is TrainingMethod.FULL:
        completed["lora"] = None
    return completed


def contradictions_without_method(values: Mapping[str, Any]) -> list[Clash]:
    """The clash of 4-bit weights with no LoRA, where no method was given that could be blamed instead."""
    no_lora = "lora" in values and values["lora"] is None
    if "method" in values or not no_lora or not _given_load_in_4bit(values.get("quantization")):
        return []
    return [
        Clash(
            path=("lora",),
            value=None,
            allowed=f"contradicts {LOAD_IN_4BIT_PATH} = true: 4-bit weights can't be trained themselves; "
            "give LoRA settings, or set load_in_4bit to false for full fine-tuning",
            other=LOAD_IN_4BIT_PATH,
        )
    ]


def contradictions(method: TrainingMethod, *, has_lora: bool, load_in_4bit: bool) -> list[Clash]:
    """What of the three does not go together, each clash naming both settings; empty where all is well."""
    needs_4bit = method is TrainingMethod.QLORA
    needs_lora = method is not TrainingMethod.FULL
    clashes = []
    if load_in_4bit != needs_4bit:
        clashes.append(
            Clash(
                path=("method",),
                value=method.value,
                allowed=f"contradicts {LOAD_IN_4BIT_PATH} = {str(load_in_4bit).lower()}: method {method.value} trains "
                f"on {'4-bit' if needs_4bit else '16-bit'} weights; leave one of the two out, and it follows the other",
                other=LOAD_IN_4BIT_PATH,
            )
        )
    if has_lora != needs_lora:
        clashes.append(
            Clash(
                path=("method",),
                value=method.value,
                allowed=f"contradicts {LORA_PATH} = {'{...}' if has_lora else 'null'}: method {method.value} "
                f"{'needs LoRA settings' if needs_lora else 'trains every weight, without LoRA'}; "
                "leave one of the two out, and it follows the other",
                other=LORA_PATH,
            )
        )
    return clashes


def _as_method(value: Any) -> TrainingMethod | None:
    """The method that `value` names, None where it names none."""
    if not isinstance(value, str):
        return None
    try:
        return TrainingMethod(value)
    except ValueError:
        return None  # the field's own check reports it


def _derive(load_in_4bit: bool | None, wants_lora: bool | None) -> TrainingMethod:
    if load_in_4bit:
        return TrainingMethod.QLORA
    if wants_lora is False:
        return TrainingMethod.FULL
    return TrainingMethod.QLORA if load_in_4bit is None else TrainingMethod.LORA


def _given_load_in_4bit(quantization: Any) -> bool | None:
    """What the user said about 4-bit weights, None where nothing (or nothing readable) was said."""
    if isinstance(quantization, Mapping):
        value = quantization.get("load_in_4bit")
        return value if isinstance(value, bool) else None
    if isinstance(quantization, BaseModel) and "load_in_4bit" in quantization.model_fields_set:
        return bool(getattr(quantization, "load_in_4bit", None))
    return None


def _with_load_in_4bit(quantization: Any, load_in_4bit: bool) -> Any:
    if isinstance(quantization, Mapping):
        return {"load_in_4bit": load_in_4bit, **quantization}  # a value of a wrong type stays, to be reported
    if isinstance(quantization, BaseModel):
        return quantization.model_copy(update={"load_in_4bit": load_in_4bit})
    return quantization
