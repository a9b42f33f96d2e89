"""Levers put on a model anew: the same gradients each time, and a model that is as it was without them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import build_tiny_llava

from eightgig.core.errors import ConfigError
from eightgig.step.layer_levers import LayerLevers
from tiny_training import gradients, load_tiny, text_loss, tiny_config, tiny_inputs

NUM_LAYERS = 3
SETTINGS: tuple[dict[str, Any], ...] = (
    {"gradient_checkpointing": False},
    {"checkpointed_layers": 1},
    {"checkpointed_layers": 2, "offload_layer_inputs": True},
    {"mlp_tile_tokens": 7, "gradient_checkpointing": False},
    {"mlp_tile_tokens": 7, "offload_layer_inputs": True},
    {"gradient_checkpointing": True},
)


def test_each_time_they_are_put_on_the_gradients_are_the_same(tmp_path: Path) -> None:
    config = tiny_config({"hardware": SETTINGS[0]})
    loaded = load_tiny(build_tiny_llava(tmp_path / "model", num_layers=NUM_LAYERS), config, adapters=True)
    model = loaded.model.train()
    layers = loaded.spec.family.decoder_layers(model)
    inputs = tiny_inputs(loaded, num_images=2)

    def passed() -> dict[str, torch.Tensor]:
        model.zero_grad(set_to_none=True)
        text_loss(loaded, inputs).backward()
        return gradients(model)

    before = {module: vars(module).get("forward") for module in model.modules()}
    expected = passed()
    levers = LayerLevers(loaded.spec, model)
    assert levers.can_tile
    for settings in (*SETTINGS, *reversed(SETTINGS)):
        levers.put_on(tiny_config({"hardware": settings}))
        is_tiled = "mlp_tile_tokens" in settings
        is_checkpointed = settings.get("gradient_checkpointing", True)
        wanted = settings.get("checkpointed_layers", NUM_LAYERS) if is_checkpointed else 0
        assert ["forward" in vars(layer) for layer in layers] == [i < wanted for i in range(NUM_LAYERS)]
        assert all(("forward" in vars(loaded.spec.family.mlp(layer))) == is_tiled for layer in layers)
        found = passed()
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-7)
    levers.put_on(tiny_config({"hardware": SETTINGS[0]}))
    assert {module: vars(module).get("forward") for module in model.modules()} == before
    with pytest.raises(ConfigError, match="at most the 3 decoder layers"):
        levers.put_on(tiny_config({"hardware": {"checkpointed_layers": 4}}))
