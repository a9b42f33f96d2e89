"""Between the published checkpoint's tensors and the model's parameters.

851 of the 853 published tensors keep their names, so adapters of any layer of the decoder and of the ViT load into the
original code. The other two are the resampler's stacked input projection: there queries, keys and values have different
inputs, and only linear layers of their own can be stored in 4 bits.

| published | here |
|---|---|
| `transformer.visual.attn_pool.attn.in_proj_weight` [3d, d] | `….attn.{q,k,v}_proj.weight` [d, d], first to last |
| `transformer.visual.attn_pool.attn.in_proj_bias` [3d] | `….attn.{q,k,v}_proj.bias` [d], first to last |
"""

from __future__ import annotations

from collections.abc import Iterable

from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Chunk, WeightConverter

STACKED: dict[str, tuple[str, ...]] = {
    f"attn_pool.attn.in_proj_{kind}": tuple(f"attn_pool.attn.{part}_proj.{kind}" for part in "qkv")
    for kind in ("weight", "bias")
}


def published_names(names: Iterable[str]) -> list[str]:
    """The checkpoint's names of the parameters called `names` here, sorted, each once."""
    published = {own: stacked for stacked, parts in STACKED.items() for own in parts}
    found = set()
    for name in names:
        suffix = next((own for own in published if name.endswith(own)), "")
        found.add(name.removesuffix(suffix) + published[suffix] if suffix else name)
    return sorted(found)


def register_load_map(class_name: str) -> None:
    """Tell transformers to split the stacked tensors when it loads `class_name`, and to stack them when it saves it.

    By class name, because other models call themselves `qwen` too, and because PEFT would otherwise take the map for
    one of adapters.
    """
    converters = [WeightConverter([stacked], list(parts), [Chunk(dim=0)]) for stacked, parts in STACKED.items()]
    register_checkpoint_conversion_mapping(class_name, converters, overwrite=True)
