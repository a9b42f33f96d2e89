"""Llama 3.2 Vision: what each token may look at, texts without images, and the conversation as it is rendered."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from eightgig import registry
from eightgig.models.adapters import check_gradients
from eightgig.models.load import LoadedModel
from eightgig.registry.mllama import LLAMA_3_2_11B_VISION, MllamaFamily
from tiny_families.mllama import ASSISTANT, TINY, USER
from tiny_family import build_tiny_family
from tiny_training import load_tiny, text_loss, tiny_config

FAMILY = MllamaFamily()


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder: Path = build_tiny_family(TINY[0], tmp_path_factory.mktemp("mllama"))
    return load_tiny(folder, tiny_config(), adapters=True)


def text_batch(loaded: LoadedModel) -> dict[str, Tensor]:
    input_ids = loaded.processor.tokenizer(["How much is two and two?"], return_tensors="pt")["input_ids"]
    masks = FAMILY.token_inputs(loaded.processor, input_ids[0], torch.zeros_like(input_ids[0]).bool(), {})
    return {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "cross_attention_mask": masks["cross_attention_mask"].unsqueeze(0),
    }


def test_texts_alone_reach_every_adapter_and_change_nothing(loaded: LoadedModel) -> None:
    batch = text_batch(loaded)
    hidden = FAMILY.hidden_states(loaded.model, batch)
    with torch.no_grad():
        own = loaded.model.get_base_model().model(**batch, use_cache=False).last_hidden_state
    torch.testing.assert_close(hidden, own, rtol=0, atol=0)
    text_loss(loaded, batch).backward()
    check_gradients(loaded.model)
    loaded.model.zero_grad()


def test_a_token_looks_at_the_tiles_of_the_last_images_before_it(loaded: LoadedModel) -> None:
    image = loaded.processor.image_token_id
    input_ids = torch.tensor([1, image, 2, 3, image, image, 4])
    tiles = torch.tensor([[[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]]])
    inputs = FAMILY.token_inputs(
        loaded.processor, input_ids, torch.zeros_like(input_ids).bool(), {"aspect_ratio_mask": tiles}
    )
    first, second, third = tiles[0]
    none = torch.zeros(4, dtype=torch.int64)
    expected = [
        [none, none, none],
        *([[first, none, none]] * 3),
        [none, second, none],
        *([[none, second, third]] * 2),
    ]
    assert inputs["cross_attention_mask"].tolist() == [[row.tolist() for row in rows] for rows in expected]


def test_without_an_image_a_conversation_begins_with_a_fixed_date(loaded: LoadedModel) -> None:
    rendered = loaded.processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}],
        add_generation_prompt=True,
        tokenize=False,
        **FAMILY.template_arguments,
    )
    system = "<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
    system += "Today Date: 26 Jul 2024\n\n<|eot_id|>"
    assert rendered == f"<|begin_of_text|>{system}{USER}Hi<|eot_id|>{ASSISTANT}"


def test_the_size_of_its_images_is_no_choice() -> None:
    assert registry.get("llama-3.2-11b-vision").facts is LLAMA_3_2_11B_VISION
    assert "4 tiles of 560 px" in str(FAMILY.image_px_note(LLAMA_3_2_11B_VISION, 336))
    assert FAMILY.image_px_note(LLAMA_3_2_11B_VISION, 1120) is None
    assert FAMILY.num_image_tokens(LLAMA_3_2_11B_VISION, 336, width_px=3000, height_px=10) == 1
