"""InstructBLIP on Vicuna: a ViT-g tower, a Q-Former that reads the question beside the image, a Llama.

Only the models with a Llama are known here; those with a FLAN-T5 are encoder-decoders and are refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from eightgig.core.errors import UnsupportedModel
from eightgig.registry.facts import ImageLayout, ModelFacts, ModulePaths
from eightgig.registry.family import PROCESSOR_FILES, ModelFamily, base_model
from eightgig.registry.standin import byte_level_tokenizer

NUM_LINEARS_A_LAYER = 7
MAX_QUESTION_TOKENS = 512  # rows of the Q-Former's position table; its queries have no positions

# No template is published: the model was trained on "{instruction} {answer}", image tokens before the start token
# (InstructBlipProcessor writes them there). Of conversations it has seen none; how a later turn is written is our own:
# an image before the words of its turn, each answer closed by the end token. A blank stands before every text, since
# some versions of the Llama tokenizer add theirs at the very start of a text alone, which here is an image.
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
    "{%- for part in message.content if part.type == 'text' -%}{{- ' ' + part.text -}}{%- endfor -%}"
    "{%- if message.role == 'assistant' -%}{{- eos_token -}}{%- endif -%}"
    "{%- endfor -%}"
)

# Source: config.json of Salesforce/instructblip-vicuna-7b, commit 92cb457. Its text section has bos 0 and eos 1, which
# are not the tokenizer's; nothing here reads them. The tower's and the Q-Former's sections are defaults but for vocab.
INSTRUCTBLIP_VICUNA_7B = ModelFacts(
    name="instructblip-vicuna-7b",
    aliases=("instructblip", "instructblip-7b", "salesforce/instructblip-vicuna-7b"),
    hub_id="Salesforce/instructblip-vicuna-7b",
    folder=None,
    licence="LLaMA, research use only",
    licence_url="https://github.com/salesforce/LAVIS/tree/main/projects/instructblip",
    source="config.json of Salesforce/instructblip-vicuna-7b, commit 92cb457; tokenizers from transformers' "
    "convert_instructblip_original_to_pytorch.py; parameters counted on the stock class of transformers 5.23",
    architecture={
        "model_type": "instructblip",
        "image_token_index": 32001,
        "num_query_tokens": 32,
        "vision_config": {
            "model_type": "instructblip_vision_model",
            "hidden_size": 1408,
            "intermediate_size": 6144,
            "num_hidden_layers": 39,
            "num_attention_heads": 16,
            "image_size": 224,
            "patch_size": 14,
            "layer_norm_eps": 1e-6,
            "qkv_bias": True,
        },
        "qformer_config": {
            "model_type": "instructblip_qformer",
            "vocab_size": 30523,
            "hidden_size": 768,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "intermediate_size": 3072,
            "max_position_embeddings": MAX_QUESTION_TOKENS,
            "cross_attention_frequency": 2,
            "encoder_hidden_size": 1408,
        },
        "text_config": {
            "model_type": "llama",
            "hidden_size": 4096,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "intermediate_size": 11008,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-6,
            "vocab_size": 32064,
            "pad_token_id": 32000,
        },
    },
    num_parameters=7_913_726_720,
    num_language_linears=32 * NUM_LINEARS_A_LAYER,
    image_px=224,
)


class InstructBlipFamily(ModelFamily):
    """Every image is squashed to one square and becomes as many tokens as the Q-Former has queries.

    What an image becomes depends on the question, which goes to the Q-Former in its own tokens, once an image. What can
    be kept of an image alone is the output of the tower below the Q-Former.
    """

    name = "instructblip"
    model_types = ("instructblip",)
    modules = ModulePaths(
        language_model="language_model.model",
        towers=("vision_model",),
        projectors=("qformer", "language_projection"),
        lm_head="language_model.lm_head",
    )
    lora_pattern = r"language_model\.model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
    keep_16bit = ("vision_model", "qformer", "language_projection", "language_model.lm_head")
    image_placeholder = "<image>"
    end_of_turn = "</s>"
    packing_obstacle = ""
    chat_template = CHAT_TEMPLATE
    accepts_image_features = True
    models = (INSTRUCTBLIP_VICUNA_7B,)
    image_layout = ImageLayout(padding={"qformer_input_ids": 0, "qformer_attention_mask": 0})
    processor_files = MappingProxyType(
        {**PROCESSOR_FILES, "Q-Former tokenizer": ("qformer_tokenizer/tokenizer.json", "qformer_tokenizer/vocab.txt")}
    )

    def facts_from_config(
        self, config: Mapping[str, Any], *, name: str, folder: Path | None, hub_id: str | None
    ) -> ModelFacts:
        """Facts read off a config.json. Raises UnsupportedModel for language models other than a Llama."""
        language_model = config.get("text_config", {}).get("model_type", "opt")  # transformers' default
        if language_model != "llama":
            raise UnsupportedModel(
                f"{name} is an InstructBLIP whose language model is a {language_model}",
                expected="one with a Llama: Salesforce/instructblip-vicuna-7b or -13b",
                next_step="use instructblip-vicuna-7b, or a newer model such as qwen2.5-vl-3b",
            )
        return super().facts_from_config(config, name=name, folder=folder, hub_id=hub_id)

    def native_image_px(self, architecture: Mapping[str, Any], image_settings: Mapping[str, Any]) -> int:
        """The side of the square that images are squashed to."""
        return int(architecture["vision_config"]["image_size"])

    def count_language_linears(self, architecture: Mapping[str, Any]) -> int:
        """q, k, v, o, gate, up and down in every layer."""
        return int(architecture["text_config"]["num_hidden_layers"]) * NUM_LINEARS_A_LAYER

    def build_processor(self, facts: ModelFacts) -> Any:
        """An `InstructBlipProcessor` with BLIP's image processing and byte-level tokenizers for both readers."""
        from transformers import BlipImageProcessor, BlipImageProcessorPil, InstructBlipProcessor
        from transformers.utils import is_torchvision_available

        config = facts.architecture
        image_id = config["image_token_index"]
        end = self.end_of_turn
        tokenizer = byte_level_tokenizer(
            {"<unk>": 0, "<s>": 1, end: 2, "[PAD]": image_id - 1, self.image_placeholder: image_id},
            vocab_size=config["text_config"]["vocab_size"],
            # The published tokenizer starts a text with its end token, and has no other unknown token.
            roles={"unk_token": end, "bos_token": end, "eos_token": end, "pad_token": "[PAD]"},
        )
        qformer_tokenizer = byte_level_tokenizer(
            {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3},
            vocab_size=config["qformer_config"]["vocab_size"],
            roles={"pad_token": "[PAD]", "unk_token": "[UNK]", "bos_token": "[CLS]", "sep_token": "[SEP]"},
        )
        qformer_tokenizer.truncation_side = "left"
        image_processor = BlipImageProcessor if is_torchvision_available() else BlipImageProcessorPil
        return InstructBlipProcessor(
            image_processor(size={"height": facts.image_px, "width": facts.image_px}),
            tokenizer,
            qformer_tokenizer,
            num_query_tokens=config["num_query_tokens"],
        )

    def check_image_px(self, facts: ModelFacts, image_px: int) -> None:
        """Nothing to refuse: the size is fixed, as `image_px_note` tells."""

    def image_px_note(self, facts: ModelFacts, image_px: int) -> str | None:
        """The published size stays."""
        if image_px == facts.image_px:
            return None
        num_tokens = self.num_image_tokens(facts, image_px, width_px=image_px, height_px=image_px)
        return f"every image is {facts.image_px} px and {num_tokens} tokens here: data.image_size is not used"

    def num_image_tokens(self, facts: ModelFacts, image_px: int | None, *, width_px: int, height_px: int) -> int:
        """The Q-Former's queries, whatever the size."""
        return int(facts.architecture["num_query_tokens"])

    def apply_image_px(self, model: Any | None, processor: Any, image_px: int | None) -> None:
        """Leave everything as published."""

    def expand_placeholders(self, processor: Any, image_inputs: Mapping[str, Any], num_images: int) -> Sequence[str]:
        """As many image tokens as queries, for each image."""
        return [self.image_placeholder * int(processor.num_query_tokens)] * num_images

    def prompt_inputs(self, processor: Any, question: str, num_images: int) -> Mapping[str, Any]:
        """The question in the Q-Former's tokens, int64 [images, question].

        What its position table has no rows for is cut where its tokenizer says: the published one's at the beginning.
        """
        tokenizer = processor.qformer_tokenizer
        limit = min(MAX_QUESTION_TOKENS, int(tokenizer.model_max_length))
        encoded = tokenizer([question] * num_images, truncation=True, max_length=limit, return_tensors="pt")
        return {f"qformer_{name}": encoded[name] for name in ("input_ids", "attention_mask")}

    def hidden_states(self, model: Any, inputs: Mapping[str, Any]) -> Any:
        """Last hidden states of the language model; transformers' own forward gives logits of all tokens, and needs
        an image.
        """
        language_model = base_model(model).get_submodule(self.modules.language_model)
        return language_model(**_language_inputs(base_model(model), inputs), use_cache=False).last_hidden_state

    def own_inputs(self, model: Any, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        """`inputs`, for texts alone with a black image that no token takes the place of."""
        if "pixel_values" in inputs:
            return inputs
        px = base_model(model).config.vision_config.image_size
        question = inputs["input_ids"].new_zeros(1, 1)
        return {
            **inputs,
            "pixel_values": question.new_zeros(1, 3, px, px).float(),
            "qformer_input_ids": question,
            "qformer_attention_mask": question + 1,
        }

    def generate(self, model: Any, inputs: Mapping[str, Any], **arguments: Any) -> Any:
        """Ids that the language model writes after the prompts, int64 [batch, new tokens]; without an image too."""
        base = base_model(model)
        return base.language_model.generate(**_language_inputs(base, inputs), **arguments)


_BELOW_LANGUAGE_MODEL = ("input_ids", "pixel_values", "qformer_input_ids", "qformer_attention_mask")


def _language_inputs(model: Any, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    """What the language model is given: embeddings [batch, sequence, hidden] with the images in place, and the rest."""
    embeddings = model.get_input_embeddings()(inputs["input_ids"])
    if "pixel_values" in inputs:
        features = model.get_image_features(
            inputs["pixel_values"],
            qformer_input_ids=inputs["qformer_input_ids"],
            qformer_attention_mask=inputs["qformer_attention_mask"],
            return_dict=True,
        ).pooler_output
        mask = model.get_placeholder_mask(inputs["input_ids"], inputs_embeds=embeddings)
        embeddings = embeddings.masked_scatter(mask, features.to(embeddings.dtype))
    others = {name: value for name, value in inputs.items() if name not in _BELOW_LANGUAGE_MODEL}
    return {"inputs_embeds": embeddings, **others}


FAMILIES = (InstructBlipFamily(),)
