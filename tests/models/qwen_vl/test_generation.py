"""Rows in evaluation and generation: with and without a cache, padded, and beyond the pretraining length."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import qwen_vl_golden as golden
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from eightgig.models.qwen_vl.modeling import QwenVLForConditionalGeneration
from eightgig.models.qwen_vl.rotary import logn_factors, ntk_alpha, rotary_angles

SEQ_LENGTH = 64


@pytest.fixture(scope="module")
def short(model: Any) -> Any:
    """The recorded model as if it had been pretrained on rows of 64 tokens."""
    config = copy.deepcopy(model.config)
    config.seq_length = SEQ_LENGTH
    twin = QwenVLForConditionalGeneration(config)
    twin.load_state_dict(model.state_dict())
    return twin.eval()


def _ids(num_tokens: int, *, batch: int = 1, seed: int = 0) -> Tensor:
    return torch.randint(0, 1000, (batch, num_tokens), generator=torch.Generator().manual_seed(seed))


def _greedy(model: Any, ids: Tensor, *, num_tokens: int = 8, **inputs: Any) -> Tensor:
    mask = inputs.pop("attention_mask", torch.ones_like(ids))
    written: Tensor = model.generate(
        input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=num_tokens, pad_token_id=1090, **inputs
    )
    return written[:, ids.shape[1] :]


@pytest.mark.parametrize("num_tokens", [5, 40, 70, 130])
def test_a_cache_changes_nothing(short: Any, num_tokens: int) -> None:
    """At lengths below, just beyond and twice beyond the pretraining length; the new tokens cross no border."""
    ids = _ids(num_tokens)
    assert torch.equal(_greedy(short, ids), _greedy(short, ids, use_cache=False))
    with torch.no_grad():
        whole = short(ids, use_cache=False).logits
        split = SEQ_LENGTH * 2 + 1 if num_tokens > SEQ_LENGTH * 2 else max(num_tokens - 3, 1)
        first = short(ids[:, :split], use_cache=True)
        rest = short(ids[:, split:], past_key_values=first.past_key_values).logits
    torch.testing.assert_close(torch.cat([first.logits, rest], dim=1), whole, rtol=0, atol=2e-5)


def test_an_image_is_read_once_and_left_padding_changes_nothing(model: Any) -> None:
    prompt = golden.TENSORS["decode.prompt_ids"]
    pixels = golden.pixel_values(["img0"])
    alone = _greedy(model, prompt, pixel_values=pixels)
    assert torch.equal(alone, _greedy(model, prompt, pixel_values=pixels, use_cache=False))
    other = _ids(20, seed=3)
    rows = torch.full((2, prompt.shape[1] + 7), 1090)
    rows[0, 7:], rows[1, -20:] = prompt[0], other[0]
    mask = (torch.arange(rows.shape[1]) >= torch.tensor([[7], [rows.shape[1] - 20]])).long()
    both = _greedy(model, rows, attention_mask=mask, pixel_values=pixels)
    assert torch.equal(both[:1], alone)
    assert torch.equal(both[1:], _greedy(model, other))


def test_beams_repeat_the_images_of_each_row(model: Any) -> None:
    prompt, pixels = golden.TENSORS["decode.prompt_ids"], golden.pixel_values(["img0"])
    one = _greedy(model, prompt, pixel_values=pixels, num_beams=2, num_tokens=4)
    two = _greedy(model, prompt.repeat(2, 1), pixel_values=pixels.repeat(2, 1, 1, 1), num_beams=2, num_tokens=4)
    assert torch.equal(two, one.repeat(2, 1))


def test_a_cache_keeps_the_base_that_its_keys_were_turned_by(short: Any) -> None:
    """Beyond a border the original goes on with the base of the row's first pass; so does this, row by row."""
    ids = _ids(SEQ_LENGTH + 6)
    with torch.no_grad():
        first = short(ids[:, :SEQ_LENGTH], use_cache=True)
        short(_ids(300), use_cache=True)  # another row, with another base
        rest = short(ids[:, SEQ_LENGTH:], past_key_values=first.past_key_values).logits
        short.config.use_dynamic_ntk = False  # the first pass's base, for a row of up to SEQ_LENGTH tokens
        whole = short(ids).logits
        short.config.use_dynamic_ntk = True
    torch.testing.assert_close(rest, whole[:, SEQ_LENGTH:], rtol=0, atol=2e-5)


def test_evaluation_leaves_training_as_it_was(short: Any) -> None:
    ids = _ids(100)
    with torch.no_grad():
        before = short.train()(ids).logits
        evaluated = short.eval()(ids).logits
        _greedy(short, ids)
        after = short.train()(ids).logits
        again = short.eval()(ids).logits
    assert torch.equal(before, after)
    assert torch.equal(evaluated, again)
    assert (before - evaluated).abs().max() > 0.1


def test_each_long_row_rule_can_be_switched_off(short: Any) -> None:
    ids = _ids(100)
    config = short.config
    with torch.no_grad():
        training = short.train()(ids).logits
        short.eval()
        both = short(ids).logits
        config.use_logn_attn = False
        without_logn = short(ids).logits
        config.use_dynamic_ntk = False
        neither = short(ids).logits
        config.use_logn_attn = config.use_dynamic_ntk = True
    assert torch.equal(neither, training)
    assert not torch.equal(both, without_logn)
    assert not torch.equal(without_logn, neither)


@given(doublings=st.integers(0, 6), fraction=st.floats(0, 1, exclude_min=True))
def test_alpha_by_hand(doublings: int, fraction: float) -> None:
    """2048 → 1; (2048, 4096] → 3; (4096, 8192] → 7; and so on."""
    low = 2048 * 2**doublings
    assert ntk_alpha(max(1, round(fraction * 2048)), 2048) == 1
    assert ntk_alpha(low + max(1, round(fraction * low)), 2048) == 2 ** (doublings + 2) - 1


def test_angles_and_factors_by_hand() -> None:
    cosines, sines = rotary_angles(torch.tensor([0, 5]), 8, 10000.0, 3)
    base = 10000.0 * 3 ** (8 / 6)
    expected = torch.tensor([5 / base ** (2 * index / 8) for index in range(4)]).repeat(2)
    torch.testing.assert_close(cosines[1], expected.cos())
    torch.testing.assert_close(sines[1], expected.sin())
    assert torch.equal(cosines[0], torch.ones(8))
    factors = logn_factors(torch.tensor([0, 63, 64, 4095]), 64)
    torch.testing.assert_close(factors.flatten(), torch.tensor([1.0, 1.0, 1.00373, 2.0]), rtol=1e-5, atol=1e-5)


def test_wrong_inputs_are_named(model: Any) -> None:
    inputs = golden.case_inputs("two_images")
    with pytest.raises(ValueError, match=r"1 images with 256 features each do not fit into 512"):
        model(**{**inputs, "pixel_values": inputs["pixel_values"][:1]})
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model()


def test_features_in_place_of_pixels(model: Any) -> None:
    inputs = golden.case_inputs("two_images")
    with torch.no_grad():
        features = model.transformer.get_image_features(inputs["pixel_values"])
        expected = model(**inputs).logits
        inputs["pixel_values"] = None
        assert torch.equal(model(**inputs, mm_encoder_outputs={"image": features}).logits, expected)


def test_logits_of_the_wanted_tokens_alone(model: Any) -> None:
    ids = _ids(20)
    with torch.no_grad():
        outputs = model(ids, output_hidden_states=True)
        last, some = (model(ids, logits_to_keep=kept).logits for kept in (3, torch.tensor([2, 5])))
    torch.testing.assert_close(last, outputs.logits[:, -3:], rtol=0, atol=1e-5)
    torch.testing.assert_close(some, outputs.logits[:, [2, 5]], rtol=0, atol=1e-5)
    assert last.shape[1] == 3
    assert len(outputs.hidden_states) == 3
