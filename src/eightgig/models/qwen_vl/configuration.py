"""The published config.json of Qwen-VL and Qwen-VL-Chat as a transformers config."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import PreTrainedConfig

# The model's own extra tokens lie together: <img>, </img> and <imgpad> have the ids image_start_id, + 1 and + 2.
IMAGE_END_OFFSET = 1
IMAGE_PAD_OFFSET = 2
RESAMPLER_HEAD_SIZE = 128
NORM_EPSILON = 1e-6


class QwenVLVisionConfig(PreTrainedConfig):  # type: ignore[misc]  # transformers is untyped
    """The `visual` part: a ViT-bigG tower and a resampler. Defaults: config.json of Qwen/Qwen-VL-Chat.

    Attributes:
        image_size: side of the square that every image is resized to, px.
        patch_size: side of a patch, px.
        width: hidden size of the tower.
        layers: blocks of the tower.
        heads: attention heads of a block.
        mlp_ratio: width of a block's MLP over `width`, rounded down.
        output_dim: hidden size of the language model; the resampler has a head for each 128 of it.
        n_queries: queries of the resampler, which is the number of tokens that an image becomes.
        image_start_id: id of `<img>`.
    """

    model_type = "qwen_vl_vision"
    base_config_key = "visual"

    image_size: int = 448
    patch_size: int = 14
    width: int = 1664
    layers: int = 48
    heads: int = 16
    mlp_ratio: float = 4.9231
    output_dim: int = 4096
    n_queries: int = 256
    image_start_id: int = 151857

    @property
    def mlp_width(self) -> int:
        """Hidden size of a block's MLP."""
        return int(self.width * self.mlp_ratio)

    @property
    def resampler_heads(self) -> int:
        """Attention heads of the resampler."""
        return max(self.output_dim // RESAMPLER_HEAD_SIZE, 1)


class QwenVLConfig(PreTrainedConfig):  # type: ignore[misc]  # transformers is untyped
    """The whole model. Defaults: config.json of Qwen/Qwen-VL-Chat; keys that it has and this class lacks are kept.

    Attributes:
        intermediate_size: twice the width of a decoder layer's MLP: w1 and w2 have half of it each.
        kv_channels: size of an attention head.
        seq_length: tokens of a pretraining row; beyond it evaluation changes the rotary base and scales queries.
        use_dynamic_ntk: change the rotary base in evaluation beyond `seq_length`.
        use_logn_attn: scale the queries in evaluation beyond `seq_length`.
        no_bias: leave the bias out of every linear layer of the decoder but c_attn.
        visual: the tower and the resampler.
    """

    model_type = "qwen"
    sub_configs: ClassVar[dict[str, Any]] = {"visual": QwenVLVisionConfig}
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    vocab_size: int = 151936
    hidden_size: int = 4096
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    kv_channels: int = 128
    intermediate_size: int = 22016
    attn_dropout_prob: float = 0.0
    emb_dropout_prob: float = 0.0
    layer_norm_epsilon: float = 1e-6
    initializer_range: float = 0.02
    max_position_embeddings: int = 8192
    seq_length: int = 2048
    rotary_emb_base: float = 10000.0
    use_dynamic_ntk: bool = True
    use_logn_attn: bool = True
    no_bias: bool = True
    use_cache: bool = True
    tie_word_embeddings: bool = False
    visual: Any = None

    def __post_init__(self, **kwargs: Any) -> None:
        if not isinstance(self.visual, QwenVLVisionConfig):
            self.visual = QwenVLVisionConfig(**(self.visual or {}))
        super().__post_init__(**kwargs)

    @property
    def image_token_id(self) -> int:
        """Id of `<imgpad>`, which stands for one image feature."""
        return int(self.visual.image_start_id) + IMAGE_PAD_OFFSET
