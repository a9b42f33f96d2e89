"""Is it really 4-bit? What each part of a loaded model is stored as, counted from its tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import bitsandbytes as bnb
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from eightgig.core.errors import UnsupportedModel
from eightgig.models.quantization import is_inside, is_kept_16bit, modules_kept_16bit, tower_is_4bit
from eightgig.registry.family import base_model

if TYPE_CHECKING:
    from eightgig.config import TrainingConfig
    from eightgig.registry import ModelSpec

GROUPS = (
    "language linears",
    "embeddings",
    "norms",
    "lm_head",
    "projector",
    "vision tower",
    "adapters",
    "other",
)
BYTES_16BIT = 2
MAX_NAMED_MODULES = 5


@dataclass(frozen=True)
class ReceiptRow:
    """One module group in one storage format.

    Attributes:
        group: one of GROUPS.
        module_class: class names of its modules, sorted.
        storage_dtype: dtype of the stored tensor, e.g. `uint8` where two 4-bit values share a byte.
        num_modules: modules that own parameters.
        num_parameters: logical parameters; a 4-bit weight counts its unpacked ones, a tied one counts once.
        num_trainable: those of them that are trained.
        bytes_16bit: what they would take in 16 bits.
        bytes_now: what their tensors take, quantisation constants among them.
        is_4bit: whether they are stored in 4 bits.
        on_host: whether they lie in the RAM of a run on a GPU: streamed layers, or a table of embeddings.
    """

    group: str
    module_class: str
    storage_dtype: str
    num_modules: int
    num_parameters: int
    num_trainable: int
    bytes_16bit: int
    bytes_now: int
    is_4bit: bool
    on_host: bool = False


@dataclass(frozen=True)
class Mismatch:
    """A linear layer that is not stored as the configuration asked."""

    module: str
    found: str
    expected: str

    def __str__(self) -> str:
        return f"{self.module} is {self.found}, not {self.expected}"


@dataclass(frozen=True)
class TowerDifference:
    """How far the features of a vision tower in 4 bits are from those of the same tower in 16 bits.

    Attributes:
        num_images: images that were compared, each by itself.
        mean_relative_error, worst_relative_error: norm of the difference over the norm in 16 bits, of an image.
        mean_cosine, worst_cosine: between the two, of an image.
    """

    num_images: int
    mean_relative_error: float
    worst_relative_error: float
    mean_cosine: float
    worst_cosine: float


@dataclass(frozen=True)
class Receipt:
    """What was loaded, part by part, and where that is not what was asked for.

    Attributes:
        tower_difference: of a run whose vision tower is in 4 bits, where its data has images; else None.
    """

    model: str
    asked: str
    rows: tuple[ReceiptRow, ...]
    mismatches: tuple[Mismatch, ...]
    tower_difference: TowerDifference | None = None

    @property
    def num_parameters(self) -> int:
        """Logical parameters of the whole model."""
        return sum(row.num_parameters for row in self.rows)

    @property
    def num_trainable(self) -> int:
        """Parameters that are trained."""
        return sum(row.num_trainable for row in self.rows)

    @property
    def bytes_16bit(self) -> int:
        """Bytes of all parameters if each took 16 bits."""
        return sum(row.bytes_16bit for row in self.rows)

    @property
    def bytes_now(self) -> int:
        """Bytes of all parameters as they are stored."""
        return sum(row.bytes_now for row in self.rows)

    def check(self) -> None:
        """Raise UnsupportedModel, naming modules, if a layer is stored otherwise than the configuration asked."""
        if not self.mismatches:
            return
        named = "; ".join(str(mismatch) for mismatch in self.mismatches[:MAX_NAMED_MODULES])
        rest = len(self.mismatches) - MAX_NAMED_MODULES
        raise UnsupportedModel(
            f"{self.model} was not loaded as asked: {named}" + (f"; and {rest} more" if rest > 0 else ""),
            expected=f"{self.asked}, as the configuration says",
            next_step="if the folder holds weights that are quantised already, give the 16-bit original as model.name; "
            "else report this with the versions of transformers and bitsandbytes",
        )

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Receipt:
        """The receipt that `to_json` gave; older ones say nothing of the tower's features."""
        difference = value.get("tower_difference")
        return cls(
            model=value["model"],
            asked=value["asked"],
            rows=tuple(ReceiptRow(**row) for row in value["rows"]),
            mismatches=tuple(Mismatch(**mismatch) for mismatch in value["mismatches"]),
            tower_difference=None if difference is None else TowerDifference(**difference),
        )

    def to_json(self) -> dict[str, Any]:
        """The receipt as plain data for JSON, totals included."""
        return {
            **dataclasses.asdict(self),
            "num_parameters": self.num_parameters,
            "num_trainable": self.num_trainable,
            "bytes_16bit": self.bytes_16bit,
            "bytes_now": self.bytes_now,
        }


@dataclass(frozen=True)
class _Part:
    """What one parameter adds to its row."""

    group: str
    module_path: str
    module_class: str
    storage_dtype: str
    is_4bit: bool
    on_host: bool
    num_parameters: int
    num_trainable: int
    bytes_now: int


def make_receipt(model: Any, spec: ModelSpec, config: TrainingConfig) -> Receipt:
    """The receipt of `model` (with or without adapters), read off its tensors, not off its settings."""
    keyed: dict[tuple[str, str, bool, bool], list[_Part]] = {}
    counted: set[int] = set()  # tied parameters are met twice
    tables: set[int] = set()  # addresses of constants that many layers may share
    for path, module in _modules(model):
        for part in _parts(path, module, spec, counted, tables):
            keyed.setdefault((part.group, part.storage_dtype, part.is_4bit, part.on_host), []).append(part)
    rows = [_row(parts) for parts in keyed.values()]
    return Receipt(
        model=spec.name,
        asked=_asked(config, spec),
        rows=tuple(sorted(rows, key=_order)),
        mismatches=tuple(_mismatches(model, spec, config)),
    )


def _order(row: ReceiptRow) -> tuple[Any, ...]:
    return (GROUPS.index(row.group), not row.is_4bit, row.storage_dtype, row.on_host)


def _modules(model: Any) -> Iterator[tuple[str, nn.Module]]:
    """Every module with its path in the plain transformers model: PEFT's wrapping leaves no trace in it."""
    for path, module in base_model(model).named_modules():
        yield path.replace(".base_layer", ""), module


def _parts(path: str, module: nn.Module, spec: ModelSpec, counted: set[int], tables: set[int]) -> Iterator[_Part]:
    for parameter in module.parameters(recurse=False):
        if id(parameter) in counted:
            continue
        counted.add(id(parameter))
        quant_state = getattr(parameter, "quant_state", None)
        num_parameters = parameter.numel() if quant_state is None else quant_state.shape.numel()
        yield _Part(
            group=_group(path, module, spec),
            module_path=path,
            module_class=type(module).__name__,
            storage_dtype=str(parameter.dtype).removeprefix("torch."),
            is_4bit=quant_state is not None,
            on_host=getattr(parameter, "on_host", False),
            num_parameters=num_parameters,
            num_trainable=num_parameters if parameter.requires_grad else 0,
            bytes_now=_bytes_of(parameter, tables),
        )


def _group(path: str, module: nn.Module, spec: ModelSpec) -> str:
    paths = spec.family.modules
    if ".lora_" in path:
        return "adapters"
    # Projectors first: some lie inside a tower.
    for group, prefixes in (
        ("projector", paths.projectors),
        ("vision tower", paths.towers),
        ("lm_head", (paths.lm_head,)),
    ):
        if is_inside(path, prefixes):
            return group
    if isinstance(module, nn.Linear):
        return "language linears"
    if isinstance(module, nn.Embedding):
        return "embeddings"
    return "norms" if "norm" in type(module).__name__.lower() else "other"


def _bytes_of(parameter: nn.Parameter, tables: set[int]) -> int:
    """Bytes of the parameter's storage and of its quantisation constants; tables shared by many count once."""
    total = parameter.numel() * parameter.element_size()
    state: Any = getattr(parameter, "quant_state", None)
    for tensor in _constants(state):
        if (
            state is not None and tensor is state.absmax
        ):  # never shared; those of streamed layers come to the same address in turns
            total += tensor.numel() * tensor.element_size()
        elif tensor.data_ptr() not in tables:
            tables.add(tensor.data_ptr())
            total += tensor.numel() * tensor.element_size()
    return total


def _constants(quant_state: Any) -> Iterator[Tensor]:
    """All tensors of a bitsandbytes QuantState: absmax, code, offset, and those of the nested state."""
    if quant_state is None:
        return
    for value in vars(quant_state).values():
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, type(quant_state)):
            yield from _constants(value)


def _row(parts: list[_Part]) -> ReceiptRow:
    first = parts[0]
    num_parameters = sum(part.num_parameters for part in parts)
    return ReceiptRow(
        group=first.group,
        module_class=", ".join(sorted({part.module_class for part in parts})),
        storage_dtype=first.storage_dtype,
        num_modules=len({part.module_path for part in parts}),
        num_parameters=num_parameters,
        num_trainable=sum(part.num_trainable for part in parts),
        bytes_16bit=num_parameters * BYTES_16BIT,
        bytes_now=sum(part.bytes_now for part in parts),
        is_4bit=first.is_4bit,
        on_host=first.on_host,
    )


def _asked(config: TrainingConfig, spec: ModelSpec) -> str:
    settings = config.training.quantization
    if not settings.load_in_4bit:
        return "no 4-bit weights"
    double = " with double quantisation" if settings.bnb_4bit_use_double_quant else ""
    tower = " and the vision tower's" if tower_is_4bit(config, spec) else ""
    return f"{settings.bnb_4bit_quant_type}{double} in the language model's linear layers{tower}, 16-bit elsewhere"


def _mismatches(model: Any, spec: ModelSpec, config: TrainingConfig) -> Iterator[Mismatch]:
    settings = config.training.quantization
    wanted_4bit = settings.bnb_4bit_quant_type + (
        " with double quantisation" if settings.bnb_4bit_use_double_quant else ""
    )
    kept = modules_kept_16bit(config, spec)
    for path, module in _modules(model):
        # PEFT's own layers wrap a linear that comes by itself; the adapters' linears are never quantised.
        if not isinstance(module, nn.Linear) or isinstance(module, BaseTunerLayer) or ".lora_" in path:
            continue
        wants_4bit = settings.load_in_4bit and not is_kept_16bit(path, kept)
        expected = wanted_4bit if wants_4bit else "unquantised"
        found = _format_of(module)
        if found != expected:
            yield Mismatch(path, found, expected)


def _format_of(module: nn.Linear) -> str:
    weight = module.weight
    if isinstance(weight, bnb.nn.Params4bit) and weight.quant_state is not None:
        return str(weight.quant_state.quant_type) + (" with double quantisation" if weight.quant_state.nested else "")
    return "unquantised" if weight.is_floating_point() else str(weight.dtype).removeprefix("torch.")
