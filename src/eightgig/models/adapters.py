"""LoRA on the language model's linear layers, through PEFT."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn

from eightgig.core.errors import ConfigError, EnvironmentProblem, Problem, UnsupportedModel
from eightgig.core.seeds import derive_seed
from eightgig.models.receipt import make_receipt

if TYPE_CHECKING:
    from eightgig.config import LoRAConfig, TrainingConfig
    from eightgig.models.load import LoadedModel
    from eightgig.registry import ModelSpec

TARGETS_PATH = "training.lora.target_modules"
NUM_NEAREST = 3


def attach_adapters(loaded: LoadedModel, config: TrainingConfig) -> None:
    """Replace `loaded.model` by a PeftModel with new fp32 adapters, and renew the receipt; without LoRA do nothing.

    The adapters' first values depend on the run's seed alone, and drawing them leaves torch's own state untouched.

    Raises:
        ConfigError: the user's pattern is no regular expression, matches nothing, or matches what is no linear layer.
        UnsupportedModel: the family's own pattern matches another number of layers than the registry says.
    """
    lora = config.training.lora
    if lora is None:
        return
    pattern = target_pattern(lora, loaded.spec)
    targets = target_paths(loaded.model, pattern)
    if lora.target_modules is None:
        _check_count(len(targets), loaded.spec)
    devices = [loaded.device] if loaded.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(derive_seed(config.seed, "lora"))
        loaded.model = get_peft_model(loaded.model, peft_config(lora, pattern, config.model.revision))
    num_adapted = sum(isinstance(module, LoraLayer) for module in loaded.model.modules())
    if num_adapted != len(targets):
        raise UnsupportedModel(
            f"PEFT put adapters on {num_adapted} layers of {loaded.spec.name}",
            expected=f"{len(targets)}, the layers that match {pattern}",
            next_step="report this with the version of peft",
        )
    loaded.receipt = make_receipt(loaded.model, loaded.spec, config)
    loaded.receipt.check()


def target_pattern(lora: LoRAConfig, spec: ModelSpec) -> str:
    """The pattern of the layers that carry adapters: the user's, else the family's."""
    return spec.family.lora_pattern if lora.target_modules is None else lora.target_modules


def adapted_layers(model: Any) -> dict[str, int]:
    """How many layers of each kind (`q_proj`, ...) carry an adapter; empty without adapters."""
    kinds = Counter(path.rpartition(".")[2] for path, module in model.named_modules() if isinstance(module, LoraLayer))
    return dict(sorted(kinds.items()))


def target_paths(model: nn.Module, pattern: str) -> list[str]:
    """Paths of the linear layers that `pattern` matches in full, in the model's order.

    Raises:
        ConfigError: the pattern is no regular expression, matches nothing, or something that is no linear layer.
    """
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise _pattern_error(pattern, f"not a regular expression ({error})", []) from error
    linears = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    matched = [path for path, _ in model.named_modules() if compiled.fullmatch(path)]
    if not matched:
        nearest = _nearest(pattern, linears)
        raise _pattern_error(
            pattern, "matches no module; it must match a whole path, so it may need a leading `.*`", nearest
        )
    others = sorted(set(matched) - set(linears))
    if others:
        inside = [path for path in linears if any(path.startswith(f"{other}.") for other in others)]
        kinds = ", ".join(f"{path} ({type(model.get_submodule(path)).__name__})" for path in others[:NUM_NEAREST])
        raise _pattern_error(
            pattern, f"matches {len(others)} modules that are no linear layers: {kinds}", inside[:NUM_NEAREST]
        )
    return matched


def check_gradients(model: Any) -> None:
    """Raise EnvironmentProblem unless the first backward reached what is trained, and nothing else.

    Each trainable parameter must have a finite gradient, and no frozen one any. A LoRA A matrix has a gradient of
    zeros while B is zero, so it is the B matrices that must not all be zero, for each kind of layer.

    Call it before the optimizer's step, on gradients that are unscaled and summed over processes; where a gradient
    scaler found an overflow and skips the step, wait for the next.
    """
    largest_by_kind: dict[str, float] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            if parameter.grad is not None:
                raise _gradient_error(f"the frozen parameter {name} has a gradient")
            continue
        if parameter.grad is None:
            raise _gradient_error(f"the trainable parameter {name} got no gradient")
        if not bool(torch.isfinite(parameter.grad).all()):
            raise _gradient_error(f"the gradient of {name} holds NaN or infinite values")
        kind = _kind(name)
        if kind is not None:
            largest = float(parameter.grad.abs().max())
            largest_by_kind[kind] = max(largest, largest_by_kind.get(kind, 0.0))
    dead = [kind for kind, largest in largest_by_kind.items() if largest == 0.0]
    if dead:
        raise _gradient_error(f"every gradient of the adapters on {', '.join(sorted(dead))} is zero")


def _kind(parameter_name: str) -> str | None:
    """What the layer of a LoRA B matrix is called, e.g. `q_proj`; for other trainable parameters their own name."""
    path, _, rest = parameter_name.partition(".lora_")
    if not rest:
        return parameter_name
    return path.rpartition(".")[2] if rest.startswith("B.") else None


def _gradient_error(found: str) -> EnvironmentProblem:
    return EnvironmentProblem(
        f"after the first backward pass {found}",
        expected="a finite gradient for every trainable parameter, and for no other",
        next_step=f"check {TARGETS_PATH} (a layer that the loss does not depend on can't be trained) and the versions "
        "of torch, peft and bitsandbytes; training on would give a wrong model",
    )


def peft_config(lora: LoRAConfig, pattern: str, revision: str | None) -> LoraConfig:
    """PEFT's settings for adapters on the layers that `pattern` matches, of a base model at `revision`."""
    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=pattern,
        bias="none",
        revision=revision,  # of the base model, so that a later reload takes the same weights
    )


def _check_count(num_targets: int, spec: ModelSpec) -> None:
    expected = spec.facts.num_language_linears
    if expected and num_targets != expected:
        raise UnsupportedModel(
            f"{spec.name} has {num_targets} linear layers where adapters belong",
            expected=f"{expected}, as the registry says",
            next_step="the model's module names differ from its family's; report this with the version of transformers",
        )


def _nearest(pattern: str, linears: Iterable[str]) -> list[str]:
    """One example for each of the kinds of layer whose path resembles the pattern most."""
    by_kind = {path.rpartition(".")[2]: path for path in linears}
    wanted = re.sub(r"[^A-Za-z0-9_.]+", "", pattern).rpartition(".")[2] or pattern
    kinds = difflib.get_close_matches(wanted, by_kind, n=NUM_NEAREST, cutoff=0.0)
    return [by_kind[kind] for kind in kinds]


def _pattern_error(pattern: str, allowed: str, examples: Sequence[str]) -> ConfigError:
    hint = f"; linear layers there are, for example: {', '.join(examples)}" if examples else ""
    return ConfigError(
        [Problem(TARGETS_PATH, pattern, f"{allowed}{hint}")],
        source="adapters",
        next_step=f"correct {TARGETS_PATH}, or leave it out for all linear layers of the language model",
    )
