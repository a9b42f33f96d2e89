"""Equal layers are simulated once: the first is put on a tape, and all of them play it.

A model has dozens of layers that allocate the same blocks in the same order. The first call of each kind runs alone on
tensors of its own, forward and backward, and what it allocates goes on a tape; this call and all like it write the tape
into the run's trace. What is outside of the layers (embeddings, head, optimizer) runs as ever, with the parameters and
gradients of all layers, so that the trace is the same as without tapes, event by event (tests/plan/test_layer_memo.py).
"""

from __future__ import annotations

import functools
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from eightgig.plan.categories import KEPT_FOR_BACKWARD, LAYER_AT_WORK, LAYER_OUTPUTS, OTHER
from eightgig.plan.layer_recording import LayerRecording, TensorShape, make_tensor, record_layer
from eightgig.plan.layer_signature import Unlike, arguments_signature, forward_signature, module_signature
from eightgig.plan.op_costs import OpCost
from eightgig.plan.recorder import Ledger, Recorder
from eightgig.plan.tape import play

MIN_EQUAL_LAYERS = 3  # fewer are not worth a tape

_OWN_REFERENCES = 2  # to a gradient that only the engine and our argument hold


class LayerMemo:
    """Remembers what each kind of call of a model's repeated layers allocates."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self._recordings: dict[Any, LayerRecording] = {}
        self._is_recording = False

    def wrap(self, model: nn.Module) -> None:
        """Wrap the forward of each layer in a list of like ones, on that instance."""
        for layer in _repeated_layers(model):
            layer.forward = self._remembered(layer, layer.forward)

    def _remembered(self, layer: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        code = forward_signature(forward)

        @functools.wraps(forward)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            # Autocast keeps cast weights beyond the layer. A layer within a recorded one is on its tape.
            if self._is_recording or torch.is_autocast_enabled("cpu"):
                return self._untaped(forward, args, kwargs)
            leaves, structure = tree_flatten((args, kwargs))
            try:
                call = (arguments_signature(leaves), structure, torch.is_grad_enabled())
                key = (module_signature(layer), code, *call)
            except Unlike:
                return self._untaped(forward, args, kwargs)
            if key not in self._recordings:
                self._recordings[key] = self._record(layer, forward, leaves, structure)
            return self._play(self._recordings[key], layer, leaves)

        return wrapped

    def _untaped(self, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """The layer itself; where its backward pass begins, the loss's has ended."""
        output = forward(*args, **kwargs)
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and tensor.requires_grad and not self._is_recording:
                tensor.register_hook(self._leave_loss)  # type: ignore[no-untyped-call]
        return output

    def _leave_loss(self, gradient: Tensor) -> None:
        self.recorder.category = OTHER

    def _record(
        self, layer: nn.Module, forward: Callable[..., Any], leaves: Sequence[Any], structure: Any
    ) -> LayerRecording:
        self._is_recording = True
        try:
            # Of what the run's layers keep others may want to know (`memory.layer_inputs`); this one is on the tape.
            with torch.autograd.graph.saved_tensors_hooks(_unchanged, _unchanged):
                return record_layer(self.recorder, layer, forward, leaves, structure)
        finally:
            self._is_recording = False

    def _play(self, recording: LayerRecording, layer: nn.Module, leaves: Sequence[Any]) -> Any:
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if recording.has_backward:
            # Without a parameter among its inputs autograd would not know that a first layer learns.
            anchor = next((parameter for parameter in layer.parameters() if parameter.requires_grad), None)
            outputs = _PlayedLayer.apply(self.recorder, recording, layer, anchor, *tensors)  # type: ignore[no-untyped-call]
        else:
            live: dict[int, int] = {}
            category = self.recorder.category if self.recorder.category != OTHER else LAYER_AT_WORK
            play(recording.forward, self.recorder.ledger, live, _ignore, category)
            _add(self.recorder.costs, recording.forward_costs)
            outputs = tuple(_hand_out(self.recorder, recording.outputs, live))
            _free_all(self.recorder.ledger, live)
        return tree_unflatten(list(outputs), recording.output_structure)


class _PlayedLayer(torch.autograd.Function):
    """A layer's place in autograd's graph, with the tape's events instead of the layer's operations."""

    @staticmethod
    def forward(
        ctx: Any,
        recorder: Recorder,
        recording: LayerRecording,
        layer: nn.Module,
        anchor: Tensor | None,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.recorder, ctx.recording, ctx.layer = recorder, recording, layer
        live: dict[int, int] = {}
        ctx.live = live
        play(recording.forward, recorder.ledger, live, _ignore)
        _add(recorder.costs, recording.forward_costs)
        held = [(block, i) for i, block in enumerate(recording.inputs) if block in recording.kept_inputs]
        ctx.held_blocks, ctx.held = [block for block, _ in held], defaultdict(list)
        ctx.is_hooked = torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
        if ctx.is_hooked:
            ctx.save_for_backward(*(tensors[i] for _, i in held))
        else:  # so that each can go before the layer's backward pass has ended
            _hold(ctx, [tensors[i] for _, i in held])
        outputs = _hand_out(recorder, recording.outputs, live)
        recorder.label(outputs, LAYER_OUTPUTS)
        for block in live.values():
            recorder.ledger.label(block, KEPT_FOR_BACKWARD)
        # What is left when the graph goes: of a backward pass that never came, or that leaves something behind.
        weakref.finalize(ctx, _free_all, recorder.ledger, live).atexit = False
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        recorder, recording, live = ctx.recorder, ctx.recording, ctx.live
        recorder.category = OTHER
        if ctx.is_hooked:
            _hold(ctx, ctx.saved_tensors)
        for block, shape, gradient in zip(recording.output_gradients, recording.outputs, gradients, strict=True):
            if gradient is not None and _is_ours_alone(gradient, shape):
                taken = recorder.take_over(gradient)
                if taken is not None:
                    live[block] = taken

        def let_go(block: int) -> None:
            ctx.held.pop(block, None)

        play(recording.backward, recorder.ledger, live, let_go)
        _add(recorder.costs, recording.backward_costs)
        parameters = dict(ctx.layer.named_parameters())
        fresh = _hand_out(recorder, [shape for _, shape in recording.parameter_gradients], live)
        for (name, _), gradient in zip(recording.parameter_gradients, fresh, strict=True):
            parameters[name].grad = gradient
        places = [i for i, shape in enumerate(recording.input_gradients) if shape is not None]
        handed = _hand_out(recorder, [shape for shape in recording.input_gradients if shape is not None], live)
        by_place = dict(zip(places, handed, strict=True))
        ctx.layer = None
        return None, None, None, None, *[by_place.get(i) for i in range(len(recording.inputs))]


def _hold(ctx: Any, tensors: Sequence[Tensor]) -> None:
    """Have the layer refer to `tensors`, until its tape lets go of their blocks."""
    for block, tensor in zip(ctx.held_blocks, tensors, strict=True):
        ctx.held[block].append(tensor)


def _unchanged(tensor: Tensor) -> Tensor:
    return tensor


def _is_ours_alone(gradient: Tensor, shape: TensorShape) -> bool:
    """Whether `gradient` goes when the layer lets it go; one that others hold, or that is spread out, stays longer."""
    if gradient.untyped_storage().nbytes() != shape.storage_bytes:
        return False
    return bool(gradient._use_count() <= _OWN_REFERENCES)  # type: ignore[attr-defined]


def _hand_out(recorder: Recorder, shapes: Sequence[TensorShape], live: dict[int, int]) -> list[Tensor]:
    """Tensors of `shapes`; from here on their blocks are freed when they go."""
    tensors = []
    for shape in shapes:
        with recorder.paused():
            tensor = make_tensor(shape)
        recorder.enter(tensor, live.pop(shape.block))
        tensors.append(tensor)
    return tensors


def _free_all(ledger: Ledger, live: dict[int, int]) -> None:
    while live:
        ledger.free(live.popitem()[1])


def _add(total: Counter[OpCost] | None, costs: Counter[OpCost]) -> None:
    if total is not None:
        total.update(costs)


def _ignore(block: int) -> None:
    """A block from outside that the layer let go: others hold it still."""


def _repeated_layers(model: nn.Module) -> Iterator[nn.Module]:
    """Layers in lists of at least MIN_EQUAL_LAYERS of one class, but not those inside of others."""
    found: set[int] = set()
    for module in model.modules():
        if id(module) in found or not isinstance(module, nn.ModuleList):
            continue
        kinds = [type(layer) for layer in module]
        for layer in module:
            if kinds.count(type(layer)) >= MIN_EQUAL_LAYERS:
                found |= {id(inner) for inner in layer.modules()}
                yield layer
