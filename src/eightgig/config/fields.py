"""Types of settings that several sections share: their ranges, and what is made of a value before pydantic sees it."""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    Strict,
    TypeAdapter,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError, ValidationError

from eightgig.config.levers import AUTO

UNKNOWN_KEY = "unknown_key"  # the pydantic error type that `messages` knows
MIN_STREAMED_LAYERS = 3  # one more than `memory.weight_ring` keeps on the GPU

_NUMBER_IN_TEXT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", re.ASCII)


def _number_from_text(value: Any) -> Any:
    """A float where `value` is text that holds a number, else `value` itself.

    YAML 1.1 wants a dot in a float, so its writers and readers (PyYAML among them) treat `1e-4` as text.
    """
    if isinstance(value, str) and _NUMBER_IN_TEXT.fullmatch(value.strip()):
        return float(value)
    return value


def _refuse_empty(value: Any) -> Any:
    """`value`, or an error where it is blank text: `Path("")` would silently mean the current folder."""
    if isinstance(value, str) and not value.strip():
        raise PydanticCustomError("blank", "a path; it is blank")
    return value


def _with_home(path: Path) -> Path:
    """`path` with a leading `~` replaced by the user's home folder, where there is one."""
    return Path(os.path.expanduser(path))


def _check_pattern(pattern: str) -> str:
    """`pattern`, or an error that says where the regular expression breaks."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise PydanticCustomError("pattern", "a regular expression ({reason})", {"reason": str(error)}) from error
    return pattern


def _check_streamed(num_layers: int) -> int:
    """`num_layers`, or an error where so few streamed layers would save nothing."""
    if 0 < num_layers < MIN_STREAMED_LAYERS:
        raise PydanticCustomError(
            "streamed_layers",
            "0, or at least {least}: the weights of two streamed layers are on the GPU at any time",
            {"least": MIN_STREAMED_LAYERS},
        )
    return num_layers


def _or_auto(kind: Any) -> WrapValidator:
    """Checks a value that is not "auto" as one of `kind` alone.

    Of a plain union pydantic reports one error for each of its kinds, each at a path that no setting has.
    """
    adapter: TypeAdapter[Any] = TypeAdapter(kind)

    def checked(value: Any, _: ValidatorFunctionWrapHandler) -> Any:
        return value if isinstance(value, str) and value == AUTO else adapter.validate_python(value)

    return WrapValidator(checked)


_FromText = BeforeValidator(_number_from_text)

# Strict, so that True is no 1, "8" no 8 and "yes" no True.
Flag = Annotated[bool, Strict()]
Count = Annotated[int, Strict(), Field(ge=1)]
CountOrZero = Annotated[int, Strict(), Field(ge=0)]
StreamedLayers = Annotated[CountOrZero, AfterValidator(_check_streamed)]
AutoFlag = Annotated[Flag | Literal["auto"], _or_auto(Flag)]
AutoCount = Annotated[Count | Literal["auto"] | None, _or_auto(Count | None)]
AutoNumber = Annotated[Count | Literal["auto"], _or_auto(Count)]
AutoStreamedLayers = Annotated[StreamedLayers | Literal["auto"], _or_auto(StreamedLayers)]
Seed = Annotated[int, Strict(), Field(ge=0, lt=2**63)]  # as wide as what `core.seeds` derives
Rank = Annotated[int, Strict(), Field(ge=1, le=1024)]
ImageSide = Annotated[int, Strict(), Field(ge=14, le=8192)]  # px; no family's patches are smaller than 14 px
PositiveNumber = Annotated[float, Strict(), Field(gt=0, allow_inf_nan=False), _FromText]
Fraction = Annotated[float, Strict(), Field(ge=0, lt=1, allow_inf_nan=False), _FromText]
LearningRate = Annotated[float, Strict(), Field(gt=0, lt=1, allow_inf_nan=False), _FromText]
Text = Annotated[str, Field(min_length=1)]
Pattern = Annotated[Text, AfterValidator(_check_pattern)]
FilePath = Annotated[Path, BeforeValidator(_refuse_empty), AfterValidator(_with_home)]


class Section(BaseModel):
    """A group of settings: frozen, and closed to unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _name_unknown_keys(cls, values: Any) -> Any:
        """Report all unknown keys, each with the nearest one; pydantic's own message would not name it."""
        unknown = [key for key in values if key not in cls.model_fields] if isinstance(values, dict) else []
        if unknown:
            raise ValidationError.from_exception_data(
                cls.__name__,
                [InitErrorDetails(type=cls._unknown_key(key), loc=(str(key),), input=values[key]) for key in unknown],
            )
        return values

    @classmethod
    def _unknown_key(cls, key: Any) -> PydanticCustomError:
        nearest = difflib.get_close_matches(str(key), cls.model_fields, n=1)
        hint = f"did you mean {nearest[0]}?" if nearest else f"{cls.__name__} has {', '.join(cls.model_fields)}"
        return PydanticCustomError(UNKNOWN_KEY, "unknown setting; {hint}", {"hint": hint})
