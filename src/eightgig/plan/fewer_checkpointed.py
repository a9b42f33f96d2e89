"""How many layers have to be checkpointed: as few as the card lets, since each one is computed twice."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

from eightgig.plan.candidates import Candidate, Candidates, Changes
from eightgig.plan.plan import reserved_limit_bytes

CHECKPOINTED_LAYERS = "hardware.checkpointed_layers"


@dataclass(frozen=True)
class _Whole:
    """What a layer that is not checkpointed takes and spares.

    Attributes:
        sample_bytes: more memory, a sample that goes through at once.
        step_s: less time, a step.
    """

    sample_bytes: float
    step_s: float


def fewer_checkpointed(
    candidates: Candidates,
    fitting: Sequence[tuple[Changes, Candidate]],
    fixed: Collection[str],
    without: Candidate | None = None,
) -> Iterator[tuple[Changes, Candidate]]:
    """Of the `fitting` variants that checkpoint all layers, the one that gains most, with the fewest that fit; if any.

    A variant that checkpoints no layer, or one with a single checkpointed layer, tells what a whole one takes; with it
    the gain of each is estimated, and where to look. Two simulations beside it are the rule, at most two and the
    logarithm of the number of layers.

    Args:
        candidates: makes variants.
        fitting: variants that fit, and their changes.
        fixed: settings that stay.
        without: the smallest of the `fitting` ones without checkpointing, where it has been simulated.
    """
    num_layers = candidates.num_decoder_layers
    options = [(changes, found) for changes, found in fitting if _checkpoints_all(found)]
    if CHECKPOINTED_LAYERS in fixed or not options or num_layers < 2:
        return
    smallest, all_of_it = min(options, key=lambda option: option[1].config.samples_per_pass)
    if without is not None and without.work is all_of_it.work:
        whole = _whole_layer(all_of_it, without, num_layers, num_checkpointed=0)
    else:
        one = candidates.get({**smallest, CHECKPOINTED_LAYERS: 1})
        if one is None:
            return
        whole = _whole_layer(all_of_it, one, num_layers, num_checkpointed=1)

    def num_whole(found: Candidate) -> int:
        return _num_whole(found, candidates.budget_bytes, whole, num_layers)

    def estimated_s(option: tuple[Changes, Candidate]) -> float:
        found = option[1]
        saved_s = num_whole(found) * whole.step_s
        # Without times fewer passes count as faster, as they do in the search.
        return found.config.training.gradient_accumulation_steps if found.time is None else found.time.step_s - saved_s

    best, found = min(options, key=estimated_s)
    found_with: dict[int, Candidate] = {}

    def fits(num_checkpointed: int) -> bool:
        tried = candidates.get({**best, CHECKPOINTED_LAYERS: num_checkpointed})
        if tried is not None and tried.fits:
            found_with[num_checkpointed] = tried
        return num_checkpointed in found_with

    fewest = smallest_fit(num_layers, num_layers - num_whole(found), fits)
    if fewest < num_layers:
        yield {**best, CHECKPOINTED_LAYERS: fewest}, found_with[fewest]


def smallest_fit(last: int, guess: int, fits: Callable[[int], bool]) -> int:
    """The smallest number from 1 to `last` that fits; what fits must fit at each larger one, and `last` does.

    Two questions if `guess` is right, at most two and the binary logarithm of `last` rounded up if not.
    """
    first, end = 1, last  # `end` fits; what is below `first` does not
    asked, is_first = min(max(guess, 1), last - 1), True
    while first < end:
        if fits(asked):
            end = asked
            neighbour = end - 1
        else:
            first = neighbour = asked + 1
        asked = neighbour if is_first else (first + end) // 2
        is_first = False
    return end


def _checkpoints_all(found: Candidate) -> bool:
    hardware = found.config.hardware
    return hardware.gradient_checkpointing and hardware.levers.checkpointed_layers is None


def _whole_layer(all_of_it: Candidate, few: Candidate, num_layers: int, *, num_checkpointed: int) -> _Whole:
    """From a run that checkpoints all layers, and one that checkpoints `num_checkpointed` of them.

    The last of the whole ones lies where a checkpointed one would be computed again, and takes nothing more.
    """
    more_bytes = few.result.peak_reserved_bytes - all_of_it.result.peak_reserved_bytes
    less_s = 0.0 if few.time is None or all_of_it.time is None else all_of_it.time.step_s - few.time.step_s
    num_samples = all_of_it.config.samples_per_pass
    num_whole = num_layers - num_checkpointed
    return _Whole(max(more_bytes, 0) / max(num_whole - 1, 1) / num_samples, less_s / num_whole)


def _num_whole(found: Candidate, budget_bytes: int, whole: _Whole, num_layers: int) -> int:
    """How many layers of `found` may stay whole, at least one of them being checkpointed: an estimate."""
    limit_bytes = reserved_limit_bytes(found.config, budget_bytes)
    assert limit_bytes is not None
    spare_bytes = limit_bytes - found.result.peak_reserved_bytes
    layer_bytes = whole.sample_bytes * found.config.samples_per_pass
    fitting = num_layers - 1 if not layer_bytes else 1 + int(spare_bytes / layer_bytes)
    return min(fitting, num_layers - 1)
