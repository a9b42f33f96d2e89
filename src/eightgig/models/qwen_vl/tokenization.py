"""From the published `qwen.tiktoken` to a fast tokenizer that gives the same ids.

The file is a list of byte strings and their ranks. A text is normalised (NFC), split by a pattern, and within a piece
the neighbours whose joint bytes have the lowest rank are joined until none is left. `tokenizers` does the same with an
ordered list of pairs, which is worked out here.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator, Mapping
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.normalizers import NFC
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from eightgig.core.errors import UnsupportedModel

VOCABULARY_FILE = "qwen.tiktoken"

# The vocabulary's own pattern: contractions, words with one leading sign, single digits, signs, line ends, blanks.
PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

END_OF_TEXT = "<|endoftext|>"
TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"
IMAGE_START, IMAGE_END, IMAGE_PAD = "<img>", "</img>", "<imgpad>"
NUM_EXTRAS = 205
# Marks of places in a picture, which questions and answers are written with: tokens of their own wherever they stand.
GROUNDING_TOKENS = ("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>")
# Tokens that no user's text may produce; EightGig breaks them up there, `split_special_tokens=True` does so elsewhere.
CONTROL_TOKENS = (
    END_OF_TEXT,
    TURN_START,
    TURN_END,
    *(f"<|extra_{index}|>" for index in range(NUM_EXTRAS)),
)
# In the order of their ids, which follow those of the vocabulary.
ADDED_TOKENS = (*CONTROL_TOKENS, *GROUNDING_TOKENS, IMAGE_START, IMAGE_END, IMAGE_PAD)

Merge = tuple[str, str]


def read_ranks(path: Path) -> dict[bytes, int]:
    """The vocabulary in a tiktoken file: byte strings and their ranks, which are 0, 1, 2, ...

    Raises:
        UnsupportedModel: the file is damaged.
    """
    ranks: dict[bytes, int] = {}
    try:
        for line in path.read_bytes().split(b"\n"):
            if line.strip():
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
    except (ValueError, binascii.Error) as error:
        raise _damaged(path, f"line {len(ranks) + 1} is not a token in base64 and its rank") from error
    if sorted(ranks.values()) != list(range(len(ranks))) or any(bytes([byte]) not in ranks for byte in range(256)):
        raise _damaged(path, "its ranks have gaps, or lack single bytes")
    return ranks


def build_tokenizer(ranks: Mapping[bytes, int], *, max_length: int) -> PreTrainedTokenizerFast:
    """A fast tokenizer with the vocabulary `ranks` and the model's added tokens behind it.

    Args:
        ranks: as `read_ranks` gives them.
        max_length: what transformers takes for the most tokens that the model can read; only used in warnings.
    """
    alphabet = bytes_to_unicode()
    spelled = {token: "".join(alphabet[byte] for byte in token) for token in ranks}
    vocabulary = {spelled[token]: rank for token, rank in ranks.items()}
    merges = [(spelled[left], spelled[right]) for left, right in _merges(ranks)]
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=merges, ignore_merges=True))
    tokenizer.normalizer = NFC()
    tokenizer.pre_tokenizer = Sequence(
        [Split(Regex(PIECES), behavior="isolated"), ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = ByteLevelDecoder()
    # One by one: a call gives the ids in its list's order, and special tokens would come first.
    for token in ADDED_TOKENS:
        tokenizer.add_tokens([AddedToken(token, special=token not in GROUNDING_TOKENS, normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
        model_max_length=max_length,
        padding_side="right",
    )


def _merges(ranks: Mapping[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    """All pairs of tokens whose joint bytes are a token, by that token's rank.

    All, not only the pair that made the token in training: tiktoken joins any of them.
    """
    for token in sorted(ranks, key=ranks.__getitem__):
        parts = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        known = [(left, right) for left, right in parts if left in ranks and right in ranks]
        yield from sorted(known, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))


def _damaged(path: Path, why: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"{path} is damaged: {why}",
        expected="the qwen.tiktoken that the model was published with",
        next_step="copy or download the file again",
    )
