"""SmolVLM2 and Idefics3, tiny: tiles of 32 px and 4 tokens, four along an image's longer side."""

from __future__ import annotations

from eightgig.registry.smolvlm import Idefics3Family, SmolVLM2Family
from tiny_family import TinyFamily, tiny_facts

TILE = "<image>" * 4
WHOLE = f"<fake_token_around_image><global-img>{TILE}<fake_token_around_image>"


def architecture(model_type: str) -> dict[str, object]:
    """A config.json of a tiny model."""
    return {
        "model_type": model_type,
        "image_token_id": 299,
        "scale_factor": 2,
        "tie_word_embeddings": False,
        "vision_config": {
            "model_type": f"{model_type}_vision",
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 8,
        },
        "text_config": {
            "model_type": "llama",
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 320,
            "pad_token_id": 2,
        },
    }


def image(num_rows: int, num_columns: int) -> str:
    """What an image cut into tiles becomes."""
    rows = (
        "".join(f"<fake_token_around_image><row_{row}_col_{column}>{TILE}" for column in range(1, num_columns + 1))
        for row in range(1, num_rows + 1)
    )
    return "\n".join((*rows, "", WHOLE))


# 53 × 37 becomes 128 × 90 and then 128 × 96, 29 × 61 becomes 60 × 128 and then 64 × 128.
CONVERSATION = (
    (f"<|im_start|>User:{image(3, 4)}{image(4, 2)}What is it?<end_of_utterance>\nAssistant:", False),
    (" A red bar.<end_of_utterance>", True),
    ("\nUser: Sure?<end_of_utterance>\nAssistant:", False),
    (" Yes.<end_of_utterance>", True),
    ("\n", False),
)

TINY = tuple(
    TinyFamily(
        name=name,
        family=family,
        facts=tiny_facts(
            family.models[0],
            architecture(name),
            num_language_linears=14,
            image_px=128,
            image_settings={"size": {"longest_edge": 128}, "max_image_size": {"longest_edge": 32}},
        ),
        conversation=CONVERSATION,
        caps_px=(20, 80, 192),
    )
    for name, family in (("idefics3", Idefics3Family()), ("smolvlm", SmolVLM2Family()))
)
