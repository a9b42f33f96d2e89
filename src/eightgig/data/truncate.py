"""Which tokens of an over-long sample go: prompt text first, never an image, never the template's markup."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from eightgig.data.quarantine import ProblemCode, SampleProblem
from eightgig.data.spans import Kind


@dataclass(frozen=True)
class Cut:
    """What stays of a sample.

    Attributes:
        keep: bool [tokens], the tokens that stay.
        supervised: bool [tokens], the tokens whose labels count; always among those that stay.
        num_prompt_tokens: user's and system's text tokens cut.
        num_answer_tokens: supervised tokens cut.
    """

    keep: NDArray[np.bool_]
    supervised: NDArray[np.bool_]
    num_prompt_tokens: int
    num_answer_tokens: int


def cut_to_length(kinds: NDArray[np.int64], answers: NDArray[np.int64], max_length: int) -> Cut:
    """The cut that leaves at most `max_length` text tokens (all but the image tokens) of a sample.

    User's and system's text goes first, oldest first, from its beginning, where questions tend to carry their context.
    Only if markup and answers alone are too long, answers lose their tails, the last answer first. A cut answer keeps
    its end token, but unsupervised: nobody should learn to stop in the middle of a sentence.

    Args:
        kinds: int64 [tokens], `Kind` of each token.
        answers: int64 [tokens], which answer an ANSWER or END token belongs to.
        max_length: most text tokens that may stay.

    Raises:
        SampleProblem: no answer token would be left to learn from, or markup alone exceeds `max_length`.
    """
    keep = np.ones(len(kinds), dtype=np.bool_)
    supervised = (kinds == Kind.ANSWER) | (kinds == Kind.END)
    num_over = int((kinds != Kind.IMAGE).sum()) - max_length
    prompt = np.flatnonzero(kinds == Kind.PROMPT)[: max(num_over, 0)]
    keep[prompt] = False
    num_over -= len(prompt)
    tails = _answer_tails(kinds, answers)[: max(num_over, 0)]
    if num_over > len(tails):
        raise SampleProblem(
            ProblemCode.TOO_LONG,
            f"the template's own {int((kinds == Kind.MARKUP).sum())} tokens leave no room for an answer within "
            f"max_length = {max_length} text tokens",
        )
    keep[tails] = False
    supervised[tails] = False
    supervised[(kinds == Kind.END) & np.isin(answers, answers[tails])] = False
    return Cut(keep, supervised, len(prompt), len(tails))


def _answer_tails(kinds: NDArray[np.int64], answers: NDArray[np.int64]) -> NDArray[np.int64]:
    """Answer tokens in the order in which they may go: from the last answer's end on; each keeps its first token."""
    tokens = np.flatnonzero(kinds == Kind.ANSWER)
    is_first = np.r_[True, np.diff(answers[tokens]) != 0] if len(tokens) else np.zeros(0, dtype=np.bool_)
    tails: NDArray[np.int64] = tokens[~is_first][::-1]
    return tails
