"""Qwen-VL for transformers: the language model with images in it, its loss, and generation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    BaseModelOutputWithPooling,
    CausalLMOutputWithPast,
)
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from eightgig.models.qwen_vl.configuration import QwenVLConfig
from eightgig.models.qwen_vl.decoder import Positions, QwenVLBlock, QwenVLRMSNorm
from eightgig.models.qwen_vl.rotary import logn_factors, ntk_alpha, rotary_angles
from eightgig.models.qwen_vl.vision import QwenVLVisionTower, Resampler, sinusoid_table

# Set on a cache by the pass that begins it: the keys in it are turned by the base that this number of tokens gave.
PREFILL_ATTRIBUTE = "num_prefill_tokens"


class QwenVLPreTrainedModel(PreTrainedModel):  # type: ignore[misc]  # transformers is untyped
    """What transformers asks of every model: config class, first values, what it supports."""

    config_class = QwenVLConfig
    base_model_prefix = "transformer"
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ("QwenVLBlock", "VisionBlock")
    _skip_keys_device_placement = ("past_key_values",)
    _supports_sdpa = True
    _can_record_outputs = {"hidden_states": QwenVLBlock}  # noqa: RUF012  # transformers reads a plain dict

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, QwenVLVisionTower):
            init.normal_(module.positional_embedding, std=module.positional_embedding.shape[1] ** -0.5)
            init.normal_(module.proj, std=module.proj.shape[0] ** -0.5)
        elif isinstance(module, Resampler):
            init.trunc_normal_(module.query, std=self.config.initializer_range)
            num_positions, width = module.pos_embed.shape
            init.copy_(module.pos_embed, sinusoid_table(width, num_positions))


class QwenVLModel(QwenVLPreTrainedModel):
    """The backbone: last hidden states of text with images in it."""

    def __init__(self, config: QwenVLConfig) -> None:
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.h = nn.ModuleList(QwenVLBlock(config, index) for index in range(config.num_hidden_layers))
        self.ln_f = QwenVLRMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.visual = QwenVLVisionTower(config.visual)
        self.gradient_checkpointing = False
        self.post_init()

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers, under the name that they have in transformers' models."""
        return self.h

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return self.wte

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the token embedding."""
        self.wte = value

    def get_image_features(self, pixel_values: Tensor, **_: Any) -> BaseModelOutputWithPooling:
        """The features of `pixel_values` as `pooler_output`, [images, queries, hidden]; `generate` asks for them."""
        return BaseModelOutputWithPooling(pooler_output=self.visual(pixel_values))

    @merge_with_config_defaults  # type: ignore[untyped-decorator]
    @capture_outputs  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        *,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        mm_encoder_outputs: Mapping[str, Any] | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: Any | None = None,
        use_cache: bool | None = None,
        **_: Any,
    ) -> BaseModelOutputWithPast:
        """Last hidden states, [batch, tokens, hidden].

        A token's place is its index in the row, padding included, as in the original.

        Args:
            input_ids: [batch, tokens]; `<imgpad>` once for each image feature.
            attention_mask: [batch, keys], 1 for tokens and 0 for padding.
            pixel_values: [images, 3, side, side], in the order in which the images stand in the rows.
            mm_encoder_outputs: image features in place of pixels: `pooler_output`, [images, queries, hidden], of
                the entry `image`.
            inputs_embeds: [batch, tokens, hidden] in place of `input_ids`, image features in it.
            past_key_values: a transformers cache.
            use_cache: make a cache where none is given.

        Raises:
            ValueError: both or neither of `input_ids` and `inputs_embeds`; other than one feature a placeholder.
        """
        if input_ids is not None and inputs_embeds is None:
            hidden = self._embed(input_ids, pixel_values, mm_encoder_outputs)
        elif inputs_embeds is not None and input_ids is None:
            hidden = inputs_embeds
        else:
            raise ValueError("give either input_ids or inputs_embeds")
        hidden = functional.dropout(hidden, self.config.emb_dropout_prob, training=self.training)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        mask = create_causal_mask(self.config, hidden, attention_mask, past_key_values)
        positions = self._positions(hidden, past_key_values)
        for block in self.h:
            hidden = block(hidden, mask, positions, past_key_values=past_key_values)
        return BaseModelOutputWithPast(last_hidden_state=self.ln_f(hidden), past_key_values=past_key_values)

    def _embed(
        self, input_ids: Tensor, pixel_values: Tensor | None, mm_encoder_outputs: Mapping[str, Any] | None
    ) -> Tensor:
        """Embeddings of `input_ids`, image features in place of the `<imgpad>` ones."""
        embeddings: Tensor = self.wte(input_ids)
        outputs = (mm_encoder_outputs or {}).get("image")
        if outputs is None and pixel_values is not None:
            outputs = self.get_image_features(pixel_values)
        if outputs is None:
            return embeddings
        features = outputs.pooler_output
        is_image = input_ids == self.config.image_token_id
        num_slots, num_features = int(is_image.sum()), features.shape[0] * features.shape[1]
        if num_slots != num_features:
            raise ValueError(
                f"{features.shape[0]} images with {features.shape[1]} features each do not fit into {num_slots} "
                f"image tokens (id {self.config.image_token_id})"
            )
        return embeddings.masked_scatter(is_image.unsqueeze(-1), features.to(embeddings))

    def _positions(self, hidden: Tensor, cache: Any | None) -> Positions:
        """The places of the tokens in `hidden`, behind those in `cache`.

        Dynamic NTK and log-n scaling act in evaluation alone. Nothing is remembered in the model: the number of
        tokens that decides about the base belongs to the cache, whose keys are turned by it.
        """
        config = self.config
        num_past = 0 if cache is None else int(cache.get_seq_length())
        num_tokens = num_past + hidden.shape[1]
        alpha = 1
        if config.use_dynamic_ntk and not self.training:
            if cache is not None and num_past == 0:
                setattr(cache, PREFILL_ATTRIBUTE, num_tokens)
            alpha = ntk_alpha(num_tokens if cache is None else getattr(cache, PREFILL_ATTRIBUTE, 0), config.seq_length)
        places = torch.arange(num_past, num_tokens, device=hidden.device)
        query_factors = None
        if config.use_logn_attn and not self.training and num_tokens > config.seq_length:
            query_factors = logn_factors(places, config.seq_length).to(hidden.dtype)
        return Positions(rotary_angles(places, config.kv_channels, config.rotary_emb_base, alpha), query_factors)


class QwenVLForConditionalGeneration(QwenVLPreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """The backbone with its head: logits, loss, `generate`. Module names are those of the published checkpoint."""

    def __init__(self, config: QwenVLConfig) -> None:
        super().__init__(config)
        self.transformer = QwenVLModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(  # noqa: PLR0913  # `generate` reads off the signature what it may pass
        self,
        input_ids: Tensor | None = None,
        *,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        mm_encoder_outputs: Mapping[str, Any] | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: Any | None = None,
        use_cache: bool | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits, [batch, kept tokens, vocab], and the mean loss over `labels` [batch, tokens] that are not -100.

        Args as in `QwenVLModel.forward`; `logits_to_keep` is the number of last tokens, or the indices of the tokens,
        whose logits are wanted, 0 for all.
        """
        outputs = self.transformer(
            input_ids,
            attention_mask=attention_mask,
            pixel_values=pixel_values,
            mm_encoder_outputs=mm_encoder_outputs,
            inputs_embeds=inputs_embeds,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )
