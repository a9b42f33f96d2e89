"""PaliGemma 2: square images of one size, a SigLIP tower, a Gemma 2 that reads images and question in both directions.

Not a chat model: it was trained on images, one question or task ("answer en What is it?", "detect car"), one answer.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from eightgig.registry.facts import ModelFacts, ModulePaths
from eightgig.registry.family import ModelFamily, base_model
from eightgig.registry.standin import byte_level_tokenizer

NUM_LINEARS_A_LAYER = 7

# No template is published. Source: PaliGemmaProcessor, which writes "{images}<bos>{question}\n" and puts answer and end
# token behind. Of conversations the model has seen none; how a later turn is written is our own: its images, its
# words, a line feed.
CHAT_TEMPLATE = (
    "{%- for message in messages if message.role == 'user' -%}{%- if loop.first -%}"
    "{%- for part in message.content if part.type == 'image' -%}{{- '<image>' -}}{%- endfor -%}"
    "{%- endif -%}{%- endfor -%}"
    "{{- bos_token -}}"
    "{%- set state = namespace(is_later=false) -%}"
    "{%- for message in messages -%}"
    "{%- if message.role == 'user' -%}"
    "{%- for part in message.content if part.type == 'image' and state.is_later -%}{{- '<image>' -}}{%- endfor -%}"
    "{%- set state.is_later = true -%}"
    "{%- endif -%}"
    "{%- for part in message.content if part.type == 'text' -%}"
    "{%- if not loop.first -%}{{- '\\n' -}}{%- endif -%}{{- part.text -}}"
    "{%- endfor -%}"
    "{{- eos_token if message.role == 'assistant' else '\\n' -}}"
    "{%- endfor -%}"
)

# Ids of the published tokenizer, from memory; what marks places and outlines comes right before the image token.
SPECIAL_TOKENS: Mapping[str, int] = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3}
PLACES = (*(f"<loc{index:04}>" for index in range(1024)), *(f"<seg{index:03}>" for index in range(128)))


def _facts(image_px: int, num_parameters: int, aliases: tuple[str, ...]) -> ModelFacts:
    hub_id = f"google/paligemma2-3b-mix-{image_px}"
    return ModelFacts(
        name=f"paligemma2-3b-{image_px}",
        aliases=(f"paligemma2-3b-mix-{image_px}", hub_id, *aliases),
        hub_id=hub_id,
        folder=None,
        licence="Gemma Terms of Use",
        licence_url="https://ai.google.dev/gemma/terms",
        source=f"what transformers' convert_paligemma2_weights_to_hf.py writes into config.json of {hub_id} (caps and "
        "window are Gemma 2's); parameters counted on the stock class of transformers 5.23",
        architecture={
            "model_type": "paligemma",
            "text_config": {
                "model_type": "gemma2",
                "hidden_size": 2304,
                "num_hidden_layers": 26,
                "num_attention_heads": 8,
                "num_key_value_heads": 4,
                "head_dim": 256,
                "intermediate_size": 9216,
                "query_pre_attn_scalar": 256,
                "vocab_size": 257216,
            },
            "vision_config": {
                "model_type": "siglip_vision_model",
                "hidden_size": 1152,
                "image_size": image_px,
                "intermediate_size": 4304,
                "num_attention_heads": 16,
                "num_hidden_layers": 27,
                "patch_size": 14,
                "vision_use_head": False,
            },
            "image_token_index": 257152,
            "pad_token_id": 0,
            "hidden_size": 2304,
            "projection_dim": 2304,
            "tie_word_embeddings": True,
        },
        num_parameters=num_parameters,
        num_language_linears=26 * NUM_LINEARS_A_LAYER,
        image_px=image_px,
    )


PALIGEMMA_2_3B = _facts(224, 3_032_242_416, ("paligemma2-3b", "paligemma-2-3b"))


class PaliGemmaFamily(ModelFamily):
    """Every image is squashed to one square, a token a patch. Everything before the first answer is seen both ways."""

    name = "paligemma"
    model_types = ("paligemma",)
    modules = ModulePaths(
        language_model="model.language_model",
        towers=("model.vision_tower",),
        projectors=("model.multi_modal_projector",),
        lm_head="lm_head",
    )
    lora_pattern = r"model\.language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
    keep_16bit = ("model.vision_tower", "model.multi_modal_projector", "lm_head")
    image_placeholder = "<image>"
    end_of_turn = "<eos>"
    packing_obstacle = "all of a prompt attends to itself both ways, by masks made of the whole row"
    chat_template = CHAT_TEMPLATE
    models = (PALIGEMMA_2_3B, _facts(448, 3_033_127_152, ()))
    # Gemma 2 caps the scores of attention, which SDPA can't: 5.23 refuses it, 5.17 would leave the cap out.
    attention = MappingProxyType({"text_config": "eager"})
    fp32_in_fp16 = ("model.language_model",)
    dtype_caution = (
        "Gemma 2 was trained in bf16 and may leave the range of fp16 (from memory; Gemma 3 does): in fp16 mode all of "
        "the language model runs in fp32 but the products with 4-bit weights."
    )
    accepts_image_features = True

    def native_image_px(self, architecture: Mapping[str, Any], image_settings: Mapping[str, Any]) -> int:
        """The side of the tower's grid."""
        return int(architecture["vision_config"]["image_size"])

    def count_language_linears(self, architecture: Mapping[str, Any]) -> int:
        """q, k, v, o, gate, up and down in every layer."""
        return int(architecture["text_config"]["num_hidden_layers"]) * NUM_LINEARS_A_LAYER

    def build_processor(self, facts: ModelFacts) -> Any:
        """A `PaliGemmaProcessor` with a byte-level tokenizer; the marks of places where the vocabulary has room."""
        from transformers import PaliGemmaProcessor, SiglipImageProcessor, SiglipImageProcessorPil
        from transformers.utils import is_torchvision_available

        image_id, px = facts.architecture["image_token_index"], facts.image_px
        first_place = image_id - len(PLACES)
        tokenizer = byte_level_tokenizer(
            {**SPECIAL_TOKENS, self.image_placeholder: image_id},
            vocab_size=facts.architecture["text_config"]["vocab_size"],
            roles={
                "pad_token": "<pad>",
                "eos_token": self.end_of_turn,
                "bos_token": "<bos>",
                "unk_token": "<unk>",
                "image_token": self.image_placeholder,
            },
            words={place: first_place + index for index, place in enumerate(PLACES)} if first_place > 0 else {},
        )
        image_processor = SiglipImageProcessor if is_torchvision_available() else SiglipImageProcessorPil
        num_tokens = self.num_image_tokens(facts, None, width_px=px, height_px=px)
        sized = image_processor(
            size={"height": px, "width": px}, image_mean=[0.5] * 3, image_std=[0.5] * 3, image_seq_length=num_tokens
        )
        return PaliGemmaProcessor(sized, tokenizer)

    def check_image_px(self, facts: ModelFacts, image_px: int) -> None:
        """Nothing to refuse: the size is fixed, as `image_px_note` tells."""

    def image_px_note(self, facts: ModelFacts, image_px: int) -> str | None:
        """The published size stays: there is a model for each."""
        if image_px == facts.image_px:
            return None
        num_tokens = self.num_image_tokens(facts, image_px, width_px=image_px, height_px=image_px)
        return f"every image is {facts.image_px} px and {num_tokens} tokens here: data.image_size is not used"

    def num_image_tokens(self, facts: ModelFacts, image_px: int | None, *, width_px: int, height_px: int) -> int:
        """One a patch, whatever the image's size."""
        return (facts.image_px // int(facts.architecture["vision_config"]["patch_size"])) ** 2

    def apply_image_px(self, model: Any | None, processor: Any, image_px: int | None) -> None:
        """Leave everything as published."""

    def token_inputs(
        self, processor: Any, input_ids: Any, is_answer: Any, image_inputs: Mapping[str, Any]
    ) -> Mapping[str, Any]:
        """What comes before the first answer (0), seen in both directions, and from there on (1), seen backwards."""
        return {"token_type_ids": (is_answer.long().cumsum(0) > 0).long()}

    def logits(self, model: Any, hidden: Any) -> Any:
        """The head's values, capped where the installed transformers caps them: 5.23 does, 5.17 does not."""
        base = base_model(model)
        values = base.get_submodule(self.modules.lm_head)(hidden)
        cap = getattr(base.config.get_text_config(), "final_logit_softcapping", None)
        return values if cap is None or not _forward_caps(type(base)) else (values / cap).tanh() * cap


def _forward_caps(model_class: Any) -> bool:
    """Whether the class's own forward reads the cap from its config; asked of the code, as no version is documented."""
    return "final_logit_softcapping" in inspect.unwrap(model_class.forward).__code__.co_consts


FAMILIES = (PaliGemmaFamily(),)
