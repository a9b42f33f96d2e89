"""One call of one layer, forward and backward, on tensors of its own: what it allocates and what it hands on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_flatten

from eightgig.plan.call_arguments import open_call
from eightgig.plan.categories import OTHER
from eightgig.plan.fake_ops import fresh_fake, span_bytes
from eightgig.plan.layer_signature import Unlike
from eightgig.plan.op_costs import OpCost
from eightgig.plan.recorder import Recorder
from eightgig.plan.tape import Event, Stretch, Tape, stretches


@dataclass(frozen=True)
class TensorShape:
    """A tensor to be made anew.

    Attributes:
        block: of its storage, on the tape.
        storage_bytes: of the whole storage, of which the tensor may be a part.
        mode: the fake tensors' mode.
    """

    block: int
    storage_bytes: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    mode: FakeTensorMode


@dataclass
class LayerRecording:
    """What a call of a layer does.

    Attributes:
        forward, backward: the stretches of its events, in blocks of one tape.
        inputs: of each tensor argument the block.
        kept_inputs: blocks of those that the layer refers to after its forward pass.
        outputs: the tensors it returns, put together by `output_structure`.
        has_backward: whether gradients flow through or into it.
        output_gradients: blocks of the gradients that come in.
        input_gradients: of each tensor argument the gradient that goes out, None without one.
        forward_costs, backward_costs: of its operations.
        parameter_gradients: of each parameter that had none before, its name and gradient.
    """

    forward: list[Stretch | Event] = field(default_factory=list)
    backward: list[Stretch | Event] = field(default_factory=list)
    inputs: list[int] = field(default_factory=list)
    kept_inputs: list[int] = field(default_factory=list)
    outputs: list[TensorShape] = field(default_factory=list)
    output_structure: Any = None
    has_backward: bool = False
    output_gradients: list[int] = field(default_factory=list)
    input_gradients: list[TensorShape | None] = field(default_factory=list)
    parameter_gradients: list[tuple[str, TensorShape]] = field(default_factory=list)
    forward_costs: Counter[OpCost] = field(default_factory=Counter)
    backward_costs: Counter[OpCost] = field(default_factory=Counter)


def record_layer(
    recorder: Recorder, layer: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any
) -> LayerRecording | None:
    """Run `forward` of `layer` on copies of its arguments, then a backward pass.

    Returns None for a layer that takes or returns what can't be copied or made anew, or that leaves something for later
    layers.

    Args:
        recorder: writes down what is allocated; its ledger stays as found.
        layer: the layer; its parameters' gradients stay as found.
        forward: what to call.
        args: its positional arguments.
        kwargs: its other arguments.
    """
    ledger, costs, category, tape = recorder.ledger, recorder.costs, recorder.category, Tape()
    gradients = {name: parameter.grad for name, parameter in layer.named_parameters()}
    recorder.ledger, recorder.category = tape, OTHER
    try:
        return _Session(recorder, tape, layer).run(forward, args, kwargs)
    except Unlike:
        return None  # what the pass made goes with the error, while the tape is still there to take note
    finally:
        recorder.ledger, recorder.costs, recorder.category = ledger, costs, category
        for name, parameter in layer.named_parameters():
            parameter.grad = gradients[name]


def make_tensor(shape: TensorShape) -> Tensor:
    """A fake tensor of `shape`."""
    num_elements = shape.storage_bytes // shape.dtype.itemsize
    spans_all = num_elements * shape.dtype.itemsize == span_bytes(shape.size, shape.stride, shape.dtype)
    if shape.offset == 0 and spans_all:
        return fresh_fake(shape.mode, shape.size, shape.stride, shape.dtype)
    whole = fresh_fake(shape.mode, (num_elements,), (1,), shape.dtype)
    return whole.as_strided(shape.size, shape.stride, shape.offset)


def shape_of(recorder: Recorder, tensor: Tensor | None) -> TensorShape:
    """What it takes to make `tensor` anew; its block is that of the present ledger.

    Raises:
        Unlike: it is not there, or not written down as a block.
    """
    block = None if tensor is None else recorder.block_of(tensor)
    if block is None or not isinstance(tensor, FakeTensor) or not tensor.untyped_storage().nbytes():
        raise Unlike("it hands on a tensor that is not of its own making")
    return TensorShape(
        block,
        tensor.untyped_storage().nbytes(),
        tuple(tensor.shape),
        tensor.stride(),
        int(tensor.storage_offset()),
        tensor.dtype,
        tensor.fake_mode,
    )


class _Session:
    """The run of one recording."""

    def __init__(self, recorder: Recorder, tape: Tape, layer: nn.Module) -> None:
        self.recorder = recorder
        self.tape = tape
        self.layer = layer
        self.recording = LayerRecording()
        self.backward_begin = self.backward_end = 0

    def run(self, forward: Callable[..., Any], args: Any, kwargs: Any) -> LayerRecording:
        recording, events = self.recording, self.tape.events
        outputs = self._forward(forward, args, kwargs)
        had_gradient = self._copy_gradients()  # now, so that with and without gradients the forward pass is one tape
        recording.kept_inputs = [block for block in dict.fromkeys(recording.inputs) if self.tape.is_live(block)]
        if recording.has_backward:
            recording.input_gradients = [None] * len(recording.inputs)
            storages = [output.untyped_storage() for output in outputs]  # whoever comes after the layer holds them too
            seed = _End.apply(self, *outputs)  # type: ignore[no-untyped-call]
            del outputs
            self.backward_end = -1
            torch.autograd.backward(seed)
            if self.backward_end < 0:
                self.backward_end = len(events)
            del seed, storages
            recording.backward = stretches(events[self.backward_begin : self.backward_end])
            recording.parameter_gradients = [
                (name, shape_of(self.recorder, parameter.grad))
                for name, parameter in self.layer.named_parameters()
                if parameter.grad is not None and name not in had_gradient
            ]
        return recording

    def _copy_gradients(self) -> set[str]:
        """Gradients of its own for the parameters that have some, so that the pass adds to them."""
        names = set()
        for name, parameter in self.layer.named_parameters():
            if parameter.grad is not None:
                with self.recorder.paused():
                    gradient = torch.empty_like(parameter.grad)
                self.recorder.enter(gradient, self.tape.external())
                parameter.grad = gradient
                names.add(name)
        return names

    def _forward(self, forward: Callable[..., Any], args: Any, kwargs: Any) -> list[Tensor]:
        leaves, structure, mappings = open_call(args, kwargs)
        args, kwargs, shared = structure.assemble(self._own(leaves), mappings)
        self.recorder.costs = self.recording.forward_costs
        output = forward(*args, **kwargs)
        self.recorder.costs = None
        if not shared.are_as_found:
            shared.clear()  # what a checkpointed layer left holds the mapping, through its graph, and so itself
            raise Unlike("it leaves something for later layers")
        self.recording.forward = stretches(self.tape.events)
        flat, self.recording.output_structure = tree_flatten(output)
        if not all(isinstance(leaf, FakeTensor) for leaf in flat):
            raise Unlike("it returns other things than tensors")
        self.recording.outputs = [shape_of(self.recorder, leaf) for leaf in flat]
        self.recording.has_backward = any(leaf.requires_grad for leaf in flat)
        return flat

    def _own(self, leaves: Sequence[Any]) -> list[Any]:
        """`leaves` with a tensor of its own for each; those that need a gradient come out of `_Begin`."""
        storages: dict[int, Tensor] = {}
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        with self.recorder.paused():
            copies = [_copy(tensor, storages) for tensor in tensors]
            probe = torch.empty(0, requires_grad=True)
        blocks = {address: self.tape.external() for address in storages}
        for address, whole in storages.items():
            self.recorder.enter(whole, blocks[address])
        self.recording.inputs = [blocks[tensor.untyped_storage()._cdata] for tensor in tensors]
        places = [i for i, tensor in enumerate(tensors) if tensor.requires_grad]
        if places and torch.is_grad_enabled():
            begun = _Begin.apply(self, places, [copies[i] for i in places], probe)  # type: ignore[no-untyped-call]
            for place, tensor in zip(places, begun, strict=True):
                copies[place] = tensor
        remaining = iter(copies)
        return [next(remaining) if isinstance(leaf, Tensor) else leaf for leaf in leaves]


def _copy(tensor: Tensor, storages: dict[int, Tensor]) -> Tensor:
    """A tensor that lies in its storage as `tensor` does in its own; tensors that share one share the copy's."""
    address = tensor.untyped_storage()._cdata
    whole = storages.get(address)
    if whole is None:
        num_elements = tensor.untyped_storage().nbytes() // tensor.dtype.itemsize
        flat = tensor.detach().as_strided((num_elements,), (1,), 0)
        whole = storages[address] = torch.empty_like(flat) if isinstance(tensor, FakeTensor) else flat.clone()
    if whole.dtype != tensor.dtype:
        raise Unlike("two of its arguments share a storage and differ in dtype")
    return whole.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


class _Begin(torch.autograd.Function):
    """What comes before the layer: its inputs that need gradients; when these arrive, the layer's backward is over."""

    @staticmethod
    def forward(
        ctx: Any, session: _Session, places: list[int], copies: list[Tensor], probe: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.session, ctx.places = session, places
        ctx.set_materialize_grads(False)  # an argument that the layer does not use gets no gradient, not zeros
        outputs = tuple(copy.detach() for copy in copies)
        copies.clear()
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[None, ...]:
        session = ctx.session
        session.backward_end = len(session.tape.events)
        session.recorder.costs = None
        for place, gradient in zip(ctx.places, gradients, strict=True):
            if gradient is not None:
                session.recording.input_gradients[place] = shape_of(session.recorder, gradient)
        return None, None, None, None


class _End(torch.autograd.Function):
    """What comes after the layer: it gives each output a gradient that no one else holds."""

    @staticmethod
    def forward(ctx: Any, session: _Session, *outputs: Tensor) -> Tensor:
        ctx.session = session
        return torch.zeros(())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        session = ctx.session
        gradients = []
        for shape in session.recording.outputs:
            with session.recorder.paused():
                made = make_tensor(shape)
            block = session.tape.external()
            session.recorder.enter(made, block)
            session.recording.output_gradients.append(block)
            gradients.append(made)
        del made
        session.backward_begin = len(session.tape.events)
        session.recorder.costs = session.recording.backward_costs
        return None, *gradients
