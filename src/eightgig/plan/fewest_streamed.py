"""How many layers must be streamed so that a run fits a card."""

from __future__ import annotations

from eightgig.config.fields import MIN_STREAMED_LAYERS
from eightgig.core.errors import UnsupportedModel
from eightgig.models.host_weights import STREAMED
from eightgig.plan.candidates import Candidate, Candidates, Changes
from eightgig.plan.fewer_checkpointed import smallest_fit


def fewest_streamed(candidates: Candidates, changes: Changes) -> int | None:
    """The fewest streamed layers with which the variant with `changes` fits, None where all of them don't suffice.

    Each one more than two takes as much less of the card as the one before, as long as the decoder decides the peak;
    so two simulations tell about where to look, and two more are the rule. No fewer than the user asked for are tried.
    """
    most = candidates.num_decoder_layers
    less = max(MIN_STREAMED_LAYERS - 1, candidates.config.hardware.levers.streamed_layers)
    none, everything = candidates.get(changes), tried(candidates, {**changes, STREAMED: most})
    if less >= most or everything is None or not everything.fits:
        return None
    guess = most - less
    if none is not None and none.device_bytes > everything.device_bytes:
        spare_bytes = candidates.budget_bytes - everything.device_bytes
        guess -= round(guess * spare_bytes / (none.device_bytes - everything.device_bytes))
    return less + smallest_fit(most - less, guess, lambda n: fits(candidates, {**changes, STREAMED: less + n}))


def tried(candidates: Candidates, changes: Changes) -> Candidate | None:
    """The variant with `changes`; None where the model does not go with them."""
    try:
        return candidates.get(changes)
    except UnsupportedModel:  # of its own: without any change it was planned
        return None


def fits(candidates: Candidates, changes: Changes) -> bool:
    """Whether the variant with `changes` can be had and fits."""
    found = tried(candidates, changes)
    return found is not None and bool(found.fits)
