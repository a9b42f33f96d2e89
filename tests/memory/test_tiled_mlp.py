"""An MLP in tiles: the same outputs and gradients, wide tensors of one tile only, and no third pass."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import tiny
from eightgig.core.errors import ConfigError
from eightgig.memory.checkpointing import checkpoint_layers
from eightgig.memory.tiled_mlp import tile_mlps
from eightgig.models.load import LoadedModel
from eightgig.registry.family import ModelFamily
from eightgig.step.build import checkpoint_as_configured, tile_as_configured
from lever_numerics import Outcome, assert_as_exact_in_bf16, assert_close, outcome_of, randomise_lora_b
from tiny_training import load_tiny, text_loss, tiny_config, tiny_inputs


class _Mlp(nn.Module):
    """A gated MLP, frozen, with an adapter on the way down."""

    def __init__(self, width: int, inner: int, dropout: float) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(width, inner), nn.Linear(width, inner), nn.Linear(inner, width)
        self.requires_grad_(False)
        self.dropout = nn.Dropout(dropout)
        self.lora_a, self.lora_b = nn.Linear(inner, 2, bias=False), nn.Linear(2, width, bias=False)
        self.num_rows: list[int] = []

    def forward(self, hidden: Tensor) -> Tensor:
        self.num_rows.append(hidden.numel() // hidden.shape[-1])
        inner = nn.functional.silu(self.gate(hidden)) * self.up(hidden)
        return self.down(inner) + self.lora_b(self.lora_a(self.dropout(inner)))


class _Layer(nn.Module):
    def __init__(self, width: int, inner: int, dropout: float) -> None:
        super().__init__()
        self.attention = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.mlp = _Mlp(width, inner, dropout)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + torch.tanh(self.attention(hidden))
        return hidden + self.mlp(self.norm(hidden))


def _stack(width: int, inner: int, dropout: float = 0.0, depth: int = 3) -> nn.Sequential:
    torch.manual_seed(width + inner)
    return nn.Sequential(*(_Layer(width, inner, dropout) for _ in range(depth))).train()


def _outcome(model: nn.Sequential, hidden: Tensor, *, autocast: bool = False) -> Outcome:
    model.zero_grad()
    hidden.grad = None
    torch.manual_seed(3)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        loss = model(hidden).float().square().mean()
    loss.backward()
    outcome = outcome_of(loss, model)
    return outcome if hidden.grad is None else Outcome(outcome.loss, {**outcome.gradients, "hidden": hidden.grad})


shapes = {
    "batch": st.integers(1, 3),
    "tokens": st.integers(1, 17),
    "width": st.integers(8, 32),
    "inner": st.integers(1, 40),
    "tile": st.integers(1, 60),
}


@settings(deadline=None, max_examples=40)
@given(**shapes, learns=st.booleans(), checkpoints=st.booleans())
def test_random_shapes_give_the_same_gradients(
    batch: int, tokens: int, width: int, inner: int, tile: int, learns: bool, checkpoints: bool
) -> None:
    model = _stack(width, inner)
    hidden = torch.randn(batch, tokens, width, requires_grad=learns)
    plain = _outcome(model, hidden)
    tile_mlps([layer.mlp for layer in model], tile, preserve_rng_state=False)
    if checkpoints:
        checkpoint_layers(model, list(model), preserve_rng_state=False)
    for layer in model:
        layer.mlp.num_rows.clear()
    assert_close(_outcome(model, hidden), plain)
    rows = [num for layer in model for num in layer.mlp.num_rows]
    assert max(rows) <= max(tile, 1)
    assert torch.allclose(model.eval()(hidden).detach(), _plain_output(width, inner, hidden), rtol=1e-5, atol=1e-6)


def _plain_output(width: int, inner: int, hidden: Tensor) -> Tensor:
    return _stack(width, inner).eval()(hidden).detach()


@pytest.mark.parametrize("checkpoints", [False, True])
def test_the_mlp_runs_twice_in_a_checkpointed_layer_too(checkpoints: bool) -> None:
    model = _stack(8, 16)
    tile_mlps([layer.mlp for layer in model], 5, preserve_rng_state=False)
    if checkpoints:
        checkpoint_layers(model, list(model), preserve_rng_state=False)
    _outcome(model, torch.randn(1, 12, 8, requires_grad=True))
    assert [sum(layer.mlp.num_rows) for layer in model] == [2 * 12] * 3


def _slope_errors(model: nn.Sequential) -> tuple[float, float]:
    """Along a random direction: the derivative that the backward pass gives less that of differences, and the latter.

    With other draws in the second pass the gradient is not the loss's.
    """
    hidden, direction = torch.randn(2, 1, 11, 6, dtype=torch.float64)

    def loss(states: Tensor) -> Tensor:
        torch.manual_seed(5)
        return model(states).square().sum()

    step = 1e-6
    with torch.no_grad():
        slope = float((loss(hidden + step * direction) - loss(hidden - step * direction)) / (2 * step))
    (gradient,) = torch.autograd.grad(loss(hidden.requires_grad_()), hidden)
    return abs(float((gradient * direction).sum()) - slope), abs(slope)


@pytest.mark.parametrize("checkpoints", [False, True])
@pytest.mark.parametrize("preserves", [False, True])
def test_dropout_draws_the_same_in_both_passes_with_the_rng_state_preserved(checkpoints: bool, preserves: bool) -> None:
    model = _stack(6, 10, dropout=0.4, depth=2).double()
    tile_mlps([layer.mlp for layer in model], 4, preserve_rng_state=preserves)
    if checkpoints:
        checkpoint_layers(model, list(model), preserve_rng_state=True)
    error, slope = _slope_errors(model)
    assert (error < 1e-6 * slope) is preserves


def test_the_second_pass_leaves_the_generator_as_it_was() -> None:
    model = _stack(6, 10, dropout=0.4, depth=2)
    tile_mlps([layer.mlp for layer in model], 4, preserve_rng_state=True)
    before = torch.get_rng_state()
    output = model(torch.randn(1, 11, 6)).sum()
    after = torch.get_rng_state()
    assert not torch.equal(before, after)
    output.backward()
    assert torch.equal(torch.get_rng_state(), after)


def test_the_second_pass_has_the_autocast_of_the_first() -> None:
    model = _stack(16, 32)
    hidden = torch.randn(2, 9, 16, requires_grad=True)
    exact, plain = _outcome(model, hidden), _outcome(model, hidden, autocast=True)
    tile_mlps([layer.mlp for layer in model], 4, preserve_rng_state=False)
    seen: list[torch.dtype] = []
    model[0].mlp.down.register_forward_hook(lambda _, __, output: seen.append(output.dtype))
    assert_as_exact_in_bf16(_outcome(model, hidden, autocast=True), plain, exact)
    assert set(seen) == {torch.bfloat16}


def test_only_the_input_is_kept_for_the_backward_pass() -> None:
    model = _stack(8, 64, depth=1)
    hidden = torch.randn(1, 40, 8, requires_grad=True)
    wide: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.shape[-1] == 64 and tensor.dim() == 3:
            wide.append(tensor.shape[1])
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(hidden).sum()
        assert max(wide) == 40
        wide.clear()
        tile_mlps([model[0].mlp], 8, preserve_rng_state=False)
        loss = model(hidden).sum()
        assert wide == []
        loss.backward()
        assert set(wide) <= {8}


def test_a_second_backward_pass_through_one_graph_is_refused() -> None:
    model = _stack(8, 16)
    tile_mlps([layer.mlp for layer in model], 5, preserve_rng_state=False)
    loss = model(torch.randn(1, 12, 8)).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="goes through its graph once"):
        loss.backward()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build_tiny_llava(tmp_path_factory.mktemp("tiny"), num_layers=3)


def _tiny_outcome(folder: Path, precision: str, **hardware: object) -> Outcome:
    loaded = _prepared(folder, precision, **hardware)
    loss = text_loss(loaded, tiny_inputs(loaded, num_images=2))
    loss.backward()
    return outcome_of(loss, loaded.model)


def _prepared(folder: Path, precision: str = "fp32", **hardware: object) -> LoadedModel:
    config = tiny_config({"hardware": hardware}, precision=precision)
    loaded = load_tiny(folder, config, adapters=True)
    randomise_lora_b(loaded.model, seed=2)
    tile_as_configured(config, loaded.spec, loaded.model)
    checkpoint_as_configured(config, loaded.spec, loaded.model)
    loaded.model.train()
    return loaded


@pytest.mark.parametrize("hardware", [{}, {"gradient_checkpointing": False}, {"checkpointed_layers": 2}])
def test_a_model_in_4_bits(folder: Path, hardware: dict[str, object]) -> None:
    exact = _tiny_outcome(folder, "fp32", gradient_checkpointing=False)
    assert_close(_tiny_outcome(folder, "fp32", mlp_tile_tokens=13, **hardware), exact)
    plain = _tiny_outcome(folder, "bf16", gradient_checkpointing=False)
    assert_as_exact_in_bf16(_tiny_outcome(folder, "bf16", mlp_tile_tokens=13, **hardware), plain, exact)


@pytest.mark.parametrize("checkpoints", [True, False])
def test_projections_of_a_model_in_4_bits(folder: Path, checkpoints: bool) -> None:
    exact = _tiny_outcome(folder, "fp32", gradient_checkpointing=False)
    levers = {"mlp_tile_tokens": 13, "tiled_projections": True, "gradient_checkpointing": checkpoints}
    assert_close(_tiny_outcome(folder, "fp32", **levers), exact)
    plain = _tiny_outcome(folder, "bf16", gradient_checkpointing=False)
    assert_as_exact_in_bf16(_tiny_outcome(folder, "bf16", **levers), plain, exact)


def test_projections_are_norms_and_each_linear_layer_outside_of_the_mlp(folder: Path) -> None:
    loaded = load_tiny(folder, tiny_config(), adapters=True)
    family = loaded.spec.family
    layer = family.decoder_layers(loaded.model)[0]
    names = {module: name for name, module in layer.named_modules()}
    assert [names[module] for module in family.projections(layer)] == [
        "input_layernorm",
        "post_attention_layernorm",
        *(f"self_attn.{name}_proj" for name in "qkvo"),
    ]


@settings(deadline=None, max_examples=20)
@given(tokens=st.integers(1, 17), width=st.integers(1, 12), wide=st.integers(1, 20), tile=st.integers(1, 9))
def test_a_linear_layer_may_change_the_width(tokens: int, width: int, wide: int, tile: int) -> None:
    torch.manual_seed(tokens + width)
    linear = nn.Linear(width, wide)
    hidden = torch.randn(2, tokens, width, requires_grad=True)
    gradient = torch.randn(2, tokens, wide)
    wanted = [hidden, *linear.parameters()]
    whole = linear(hidden)
    expected = torch.autograd.grad(whole, wanted, gradient)
    tile_mlps([linear], tile, preserve_rng_state=False)
    tiled = linear(hidden)
    torch.testing.assert_close(tiled, whole)
    torch.testing.assert_close(torch.autograd.grad(tiled, wanted, gradient), expected)
    with torch.no_grad():
        torch.testing.assert_close(linear(hidden), whole)


def test_a_family_whose_mlp_cannot_be_told_says_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ModelFamily, "mlp", lambda self, layer: None)
    with pytest.raises(ConfigError, match=r"hardware\.mlp_tile_tokens = 13: null: decoder layers of .* have no MLP"):
        _prepared(folder, mlp_tile_tokens=13)
