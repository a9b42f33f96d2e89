"""A stand-in tokenizer for models whose weights are random: every id is real, no vocabulary file is needed."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any


def byte_level_tokenizer(
    special_tokens: Mapping[str, int],
    *,
    vocab_size: int,
    roles: Mapping[str, str],
    words: Mapping[str, int] = MappingProxyType({}),
) -> Any:
    """A tokenizer that writes any text as its UTF-8 bytes, with the special tokens at the ids the model expects.

    Bytes take the lowest ids that no special token has. Ids left over get names that no text produces, so that the
    vocabulary has no holes.

    Args:
        special_tokens: token -> id; each id below `vocab_size`.
        vocab_size: rows of the model's embedding; no id emitted reaches it.
        roles: keyword of the transformers tokenizer -> token, e.g. `{"pad_token": "<pad>"}`; a `bos_token` is put in
            front of every text.
        words: text -> id of ordinary tokens of several bytes, where the model's image rule counts on them.
    """
    from tokenizers import AddedToken, Tokenizer
    from tokenizers.decoders import ByteLevel as ByteLevelDecoder
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(BPE(vocab=_vocabulary({**special_tokens, **words}, vocab_size), merges=[]))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special_tokens])
    tokenizer.add_tokens([AddedToken(word, special=False, normalized=False) for word in words])
    bos = roles.get("bos_token")
    if bos is not None:
        tokenizer.post_processor = TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, special_tokens[bos])]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, padding_side="right", **roles
    )


def _vocabulary(special_tokens: Mapping[str, int], vocab_size: int) -> dict[str, int]:
    from tokenizers.pre_tokenizers import ByteLevel

    symbols = sorted(ByteLevel.alphabet())
    taken = set(special_tokens.values())
    last = max(taken, default=0)
    if len(taken) != len(special_tokens) or last >= vocab_size or len(symbols) + len(taken) > vocab_size:
        raise ValueError(f"{len(symbols)} bytes and {dict(special_tokens)} do not fit into {vocab_size} ids")
    free = (token_id for token_id in range(vocab_size) if token_id not in taken)
    vocabulary = {**special_tokens, **{symbol: next(free) for symbol in symbols}}
    vocabulary.update({f"<unused_{token_id}>": token_id for token_id in free if token_id < last})
    return vocabulary
