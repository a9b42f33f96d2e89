"""The embedded model: a stock `LlavaForConditionalGeneration` of about 8.8 M parameters, and its forward pass."""

from __future__ import annotations

import torch
from benchmarks.demo_model.conversation import CHAT_TEMPLATE, IMAGE
from torch import nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip import CLIPImageProcessor

from eightgig.demo.palette import IMAGE_SIZE_PX

PATCH_SIZE_PX = 16
NUM_IMAGE_TOKENS = (IMAGE_SIZE_PX // PATCH_SIZE_PX) ** 2
WIDTH = 256
"""Width of both halves. It and the inner widths are multiples of 64, the block of NF4."""


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
    """A model with random weights in fp32 whose vocabulary is `tokenizer`'s, rounded up to a multiple of 64."""
    vocabulary = -(-len(tokenizer) // 64) * 64
    vision = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=6,
        num_attention_heads=4,
        image_size=IMAGE_SIZE_PX,
        patch_size=PATCH_SIZE_PX,
        hidden_act="gelu",
    )
    text = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=1024,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_seq_length=NUM_IMAGE_TOKENS,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        projector_hidden_act="gelu",
        tie_word_embeddings=False,
    )
    return LlavaForConditionalGeneration(config)


def build_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """The processor: pictures are squashed to 128 x 128 px, not cropped, so that nothing of a user's is cut away."""
    size = {"height": IMAGE_SIZE_PX, "width": IMAGE_SIZE_PX}
    image_processor = CLIPImageProcessor(size=size, do_center_crop=False)
    return LlavaProcessor(
        image_processor,
        tokenizer,
        patch_size=PATCH_SIZE_PX,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=IMAGE,
        chat_template=CHAT_TEMPLATE,
    )


class PretrainingForward(nn.Module):
    """Mean cross-entropy of the target tokens, without the syncs that keep the stock forward out of a CUDA graph.

    Rows are padded on the right, so that a causal mask is all the masking there is.
    """

    def __init__(self, model: LlavaForConditionalGeneration, image_position: int) -> None:
        super().__init__()
        self.model = model
        self.image_position = image_position
        processor = CLIPImageProcessor()
        self.register_buffer("mean", torch.tensor(processor.image_mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(processor.image_std).view(1, 3, 1, 1))

    def logits(self, pixels: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """(batch, text tokens, vocabulary) logits; `pixels` (batch, 128, 128, 3) uint8, `ids` with one image token."""
        inner = self.model.model
        normalised = (pixels.permute(0, 3, 1, 2).float() / 255 - self.mean) / self.std
        features = inner.vision_tower(normalised, output_hidden_states=True).hidden_states[-1][:, 1:]
        features = inner.multi_modal_projector(features)
        embedded = inner.language_model.embed_tokens(ids).to(features.dtype)
        split = self.image_position
        hidden = torch.cat([embedded[:, :split], features, embedded[:, split + 1 :]], dim=1)
        positions = torch.arange(hidden.shape[1], device=hidden.device).unsqueeze(0)
        rotary = inner.language_model.rotary_emb(hidden, position_ids=positions)
        for layer in inner.language_model.layers:
            hidden = layer(hidden, attention_mask=None, position_ids=positions, position_embeddings=rotary)
        hidden = inner.language_model.norm(hidden)
        text = torch.cat([hidden[:, :split], hidden[:, split + NUM_IMAGE_TOKENS - 1 :]], dim=1)
        return self.model.lm_head(text)

    def forward(self, pixels: torch.Tensor, ids: torch.Tensor, is_target: torch.Tensor) -> torch.Tensor:
        """Scalar loss; `is_target` marks the tokens to be foretold by the position before them."""
        logits = self.logits(pixels, ids)[:, :-1]
        losses = nn.functional.cross_entropy(logits.transpose(1, 2).float(), ids[:, 1:], reduction="none")
        weights = is_target[:, 1:].float()
        return (losses * weights).sum() / weights.sum()
