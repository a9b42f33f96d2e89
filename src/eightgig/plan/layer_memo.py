"""Equal layers are simulated once: the first is put on a tape, and all of them play it.

A model has dozens of layers that allocate the same blocks in the same order. The first call of each kind runs alone on
tensors of its own, forward and backward, and what it allocates goes on a tape; this call and all like it write the tape
into the run's trace. What is outside of the layers (embeddings, head, optimizer) runs as ever, with the parameters and
gradients of all layers, so that the trace is the same as without tapes, event by event (tests/plan/test_layer_memo.py).
Where rows go through a layer in groups, all but the gradients of the layer at work is: autograd adds these up first.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_unflatten

from eightgig.memory.kept_tensors import KeptTensors
from eightgig.plan.call_arguments import open_call
from eightgig.plan.categories import KEPT_FOR_BACKWARD, LAYER_AT_WORK, LAYER_OUTPUTS, OTHER
from eightgig.plan.layer_recording import LayerRecording, TensorShape, make_tensor, record_layer
from eightgig.plan.layer_signature import Unlike, arguments_signature, forward_signature, module_signature
from eightgig.plan.op_costs import OpCost
from eightgig.plan.recorder import Ledger, Recorder
from eightgig.plan.tape import play
from eightgig.plan.trace import MemoryTrace

MIN_EQUAL_LAYERS = 3  # fewer are not worth a tape

_OWN_REFERENCES = 2  # to a gradient that only the engine and our argument hold


class LayerMemo:
    """Remembers what each kind of call of a model's repeated layers allocates."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self._recordings: dict[Any, LayerRecording | None] = {}  # None: it can't be recorded
        self._is_recording = False

    def wrap(self, model: nn.Module, *, in_groups: bool = False) -> None:
        """Wrap the forward of each layer in a list of like ones, on that instance.

        With `in_groups` a layer is called several times before its first backward pass (`memory.row_groups`): the later
        ones of these find gradients that were not there in their forward passes.
        """
        for layer in _repeated_layers(model):
            layer.forward = self._remembered(layer, layer.forward, in_groups)

    def _remembered(self, layer: nn.Module, forward: Callable[..., Any], in_groups: bool) -> Callable[..., Any]:
        parameters = dict(layer.named_parameters())
        code = forward_signature(forward)

        @functools.wraps(forward)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            # Autocast keeps cast weights beyond the layer. A layer within a recorded one is on its tape.
            if self._is_recording or torch.is_autocast_enabled("cpu"):
                return self._untaped(forward, args, kwargs)
            leaves, structure, _ = open_call(args, kwargs)
            try:
                call = (arguments_signature(leaves), structure, torch.is_grad_enabled())
                key = (module_signature(layer, parameters.values()), code, *call)
            except Unlike:
                return self._untaped(forward, args, kwargs)
            if key not in self._recordings:
                self._recordings[key] = self._record(layer, forward, args, kwargs)
            if self._recordings[key] is None:
                return self._untaped(forward, args, kwargs)
            played = _Call(self._recordings, key, parameters)
            if in_groups:
                with played.gradients(self.recorder):
                    if played.key() not in self._recordings:
                        self._recordings[played.key()] = self._record(layer, forward, args, kwargs)
            return self._play(played, leaves)

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

    def _record(self, layer: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> LayerRecording | None:
        self._is_recording = True
        # Hooks of the run (`memory.layer_inputs`) need not know of this layer, whose inputs are on the tape. Whoever
        # has hooks has handed over what they hand back.
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda tensor: [tensor], lambda held: held.pop())
        try:
            with hooks if _is_hooked() else contextlib.nullcontext():
                return record_layer(self.recorder, layer, forward, args, kwargs)
        finally:
            self._is_recording = False

    def _play(self, call: _Call, leaves: Sequence[Any]) -> Any:
        tensors, recording = [leaf for leaf in leaves if isinstance(leaf, Tensor)], call.recording()
        if recording.has_backward:
            # Without a parameter among its inputs autograd would not know that a first layer learns.
            anchor = next((parameter for parameter in call.parameters.values() if parameter.requires_grad), None)
            held = _Held.of(recording, tensors, self.recorder)
            outputs = _PlayedLayer.apply(self.recorder, call, held, anchor, *tensors)  # type: ignore[no-untyped-call]
        else:
            live: dict[int, int] = {}
            category = self.recorder.category if self.recorder.category != OTHER else LAYER_AT_WORK
            play(recording.forward, _trace_of(self.recorder), live, _ignore, category)
            _add(self.recorder.costs, recording.forward_costs)
            outputs = tuple(_hand_out(self.recorder, recording.outputs, live))
            _free_all(self.recorder.ledger, live)
        return tree_unflatten(list(outputs), recording.output_structure)


@dataclass(frozen=True)
class _Call:
    """A call of a layer: what is known of it, which depends on the gradients that its parameters have by now.

    In the backward pass these may be others than in the forward pass: where rows go through a layer in groups
    (`memory.row_groups`), the first group back makes the gradients that the others are added to.
    """

    recordings: Mapping[Any, LayerRecording | None]
    begun: tuple[Any, ...]
    parameters: Mapping[str, nn.Parameter]

    def key(self) -> tuple[Any, ...]:
        """Under which it is recorded."""
        (known, training, _), *rest = self.begun
        return ((known, training, tuple(parameter.grad is not None for parameter in self.parameters.values())), *rest)

    def recording(self) -> LayerRecording:
        """What it does as things stand."""
        recording = self.recordings[self.key()]
        assert recording is not None  # where one can be recorded, so can the other
        return recording

    @contextlib.contextmanager
    def gradients(self, recorder: Recorder) -> Iterator[None]:
        """Inside, the parameters have the gradients that this call would make."""
        made = self.recording().parameter_gradients
        with recorder.paused():
            for name, shape in made:
                self.parameters[name].grad = make_tensor(shape)
        try:
            yield
        finally:
            for name, _ in made:
                self.parameters[name].grad = None


class _Held:
    """Inputs that a layer refers to after its forward pass; where someone else takes over what autograd saves, so too.

    Attributes:
        tensors: of each block of the tape, those that lie in it.
    """

    def __init__(self) -> None:
        self.tensors: dict[int, list[Tensor]] = defaultdict(list)
        self._blocks: list[int] = []
        self._kept: KeptTensors | None = None

    @classmethod
    def of(cls, recording: LayerRecording, tensors: Sequence[Tensor], recorder: Recorder) -> _Held:
        """What is kept of `tensors`, the arguments of a call."""
        held, places = cls(), [i for i, block in enumerate(recording.inputs) if block in recording.kept_inputs]
        held._blocks = [recording.inputs[i] for i in places]
        kept = [tensors[i] for i in places]
        if _is_hooked():
            with recorder.paused():
                held._kept = KeptTensors(*kept)
        else:  # so that each can go before the layer's backward pass has ended
            held._fill(kept)
        return held

    def come_back(self) -> None:
        """Have the tensors here, also those that someone else had."""
        if self._kept is not None:
            self._fill(self._kept.hand_back())
            self._kept = None

    def let_go(self, block: int) -> None:
        """The layer has no more use for what lies in `block`."""
        self.tensors.pop(block, None)

    def _fill(self, tensors: Sequence[Tensor]) -> None:
        for block, tensor in zip(self._blocks, tensors, strict=True):
            self.tensors[block].append(tensor)


class _PlayedLayer(torch.autograd.Function):
    """A layer's place in autograd's graph, with the tape's events instead of the layer's operations."""

    @staticmethod
    def forward(
        ctx: Any,
        recorder: Recorder,
        call: _Call,
        held: _Held,
        anchor: Tensor | None,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.recorder, ctx.call, ctx.held = recorder, call, held
        recording = call.recording()
        live: dict[int, int] = {}
        ctx.live = live
        play(recording.forward, _trace_of(recorder), live, _ignore)
        _add(recorder.costs, recording.forward_costs)
        outputs = _hand_out(recorder, recording.outputs, live)
        recorder.label(outputs, LAYER_OUTPUTS)
        for block in live.values():
            recorder.ledger.label(block, KEPT_FOR_BACKWARD)
        # What is left when the graph goes: of a backward pass that never came, or that leaves something behind.
        weakref.finalize(ctx, _free_all, recorder.ledger, live).atexit = False
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        recorder, recording, live = ctx.recorder, ctx.call.recording(), ctx.live
        recorder.category = OTHER
        ctx.held.come_back()
        for block, shape, gradient in zip(recording.output_gradients, recording.outputs, gradients, strict=True):
            if gradient is not None and _is_ours_alone(gradient, shape):
                taken = recorder.take_over(gradient)
                if taken is not None:
                    live[block] = taken

        play(recording.backward, _trace_of(recorder), live, ctx.held.let_go)
        _add(recorder.costs, recording.backward_costs)
        parameters = ctx.call.parameters
        fresh = _hand_out(recorder, [shape for _, shape in recording.parameter_gradients], live)
        for (name, _), gradient in zip(recording.parameter_gradients, fresh, strict=True):
            parameters[name].grad = gradient
        places = [i for i, shape in enumerate(recording.input_gradients) if shape is not None]
        handed = _hand_out(recorder, [shape for shape in recording.input_gradients if shape is not None], live)
        by_place = dict(zip(places, handed, strict=True))
        return None, None, None, None, *[by_place.get(i) for i in range(len(recording.inputs))]


def _is_hooked() -> bool:
    """Whether someone takes over what autograd saves from here on."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def _is_ours_alone(gradient: Tensor, shape: TensorShape) -> bool:
    """Whether `gradient` goes when the layer lets it go; one that others hold, or that is spread out, stays longer."""
    if gradient.untyped_storage().nbytes() != shape.storage_bytes:
        return False
    return bool(gradient._use_count() <= _OWN_REFERENCES)  # type: ignore[attr-defined]


def _trace_of(recorder: Recorder) -> MemoryTrace:
    """The run's trace: no layer is played onto the tape of another."""
    assert isinstance(recorder.ledger, MemoryTrace)
    return recorder.ledger


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
