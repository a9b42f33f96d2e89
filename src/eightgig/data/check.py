"""The pass over all samples before training: every image whole, every text with something to learn."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from eightgig.core.errors import DataError
from eightgig.core.logging import get_logger
from eightgig.data.encode import Encoder, TextMeasure
from eightgig.data.images import check_image, image_size
from eightgig.data.quarantine import Quarantine, QuarantineRecord, SampleProblem, commonest
from eightgig.data.sample import ImagePart, Sample
from eightgig.data.sources import SampleSet

_NUM_AHEAD = 64  # images being checked before their sample's turn comes; bounds what the pool holds in memory

logger = get_logger(__name__)


@dataclass(frozen=True)
class SampleSize:
    """What decides how much memory a sample takes.

    Attributes:
        num_text_tokens: after cutting, image tokens not counted.
        image_sizes_px: width and height of each image, in order.
    """

    num_text_tokens: int
    image_sizes_px: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class CheckReport:
    """What the check found.

    Attributes:
        samples: the good samples, in their old order.
        sizes: theirs, in the same order.
        num_bad: samples of this set quarantined, by reading or by the check.
        num_images: images in the good samples.
        largest_image_px: width and height of the good image with the most pixels, None without images.
        max_text_tokens: text tokens of the longest good sample, after cutting.
        num_supervised_tokens: tokens of all good samples that the loss counts.
        num_shortened_prompts: samples whose prompt text was cut; `num_cut_prompt_tokens` in all.
        num_shortened_answers: samples whose answer was cut; `num_cut_answer_tokens` in all.
        num_escaped: special tokens that texts spelled out, and that were broken up.
    """

    samples: tuple[Sample, ...]
    sizes: tuple[SampleSize, ...]
    num_bad: int
    num_images: int
    largest_image_px: tuple[int, int] | None
    max_text_tokens: int
    num_supervised_tokens: int
    num_shortened_prompts: int
    num_cut_prompt_tokens: int
    num_shortened_answers: int
    num_cut_answer_tokens: int
    num_escaped: int


@dataclass(frozen=True)
class CheckedSample:
    """A sample that can be trained on, and what was counted of it.

    Attributes:
        image_sizes_px: width and height of each of its images, upright, in the order of the messages.
    """

    sample: Sample
    text: TextMeasure
    image_sizes_px: tuple[tuple[int, int], ...]


def check_samples(
    sample_set: SampleSet,
    encoder: Encoder,
    quarantine: Quarantine,
    *,
    max_bad_fraction: float,
    num_threads: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> CheckReport:
    """What can be trained on, with counts. Bad samples go to `quarantine`, which is written to its file.

    Images are decoded by `num_threads` threads (default: one a core, at most 8), each file once however many samples
    show it. `on_progress` is called with samples done and samples in all.

    Raises:
        DataError: more than `max_bad_fraction` of the records are bad, or none is good.
    """
    num_before = len(quarantine)
    good = examine_samples(
        sample_set,
        encoder,
        quarantine,
        max_bad_fraction=max_bad_fraction,
        num_threads=num_threads,
        on_progress=on_progress,
    )
    measures = [checked.text for checked in good]
    sizes = [size for checked in good for size in checked.image_sizes_px]
    return CheckReport(
        samples=tuple(checked.sample for checked in good),
        sizes=tuple(SampleSize(checked.text.num_text_tokens, checked.image_sizes_px) for checked in good),
        num_bad=len(sample_set.bad) + len(quarantine) - num_before,
        num_images=len(sizes),
        largest_image_px=max(sizes, key=lambda size: size[0] * size[1], default=None),
        max_text_tokens=max(measure.num_text_tokens for measure in measures),
        num_supervised_tokens=sum(measure.num_supervised_tokens for measure in measures),
        num_shortened_prompts=sum(measure.num_cut_prompt_tokens > 0 for measure in measures),
        num_cut_prompt_tokens=sum(measure.num_cut_prompt_tokens for measure in measures),
        num_shortened_answers=sum(measure.num_cut_answer_tokens > 0 for measure in measures),
        num_cut_answer_tokens=sum(measure.num_cut_answer_tokens for measure in measures),
        num_escaped=sum(measure.num_escaped for measure in measures),
    )


def examine_samples(
    sample_set: SampleSet,
    encoder: Encoder,
    quarantine: Quarantine,
    *,
    max_bad_fraction: float,
    decodes_images: bool = True,
    num_threads: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[CheckedSample]:
    """The good samples in their old order, each with its counts; else as `check_samples`.

    Args:
        sample_set: what was read.
        encoder: counts the texts' tokens.
        quarantine: gathers the bad samples, and is written to its file.
        max_bad_fraction: share of the records that may be bad.
        decodes_images: whether each image is decoded to its end; False reads headers alone, and so does not notice a
            file that is broken behind its header.
        num_threads: as of `check_samples`.
        on_progress: as of `check_samples`.
    """
    num_before = len(quarantine)
    num_threads = num_threads or min(os.cpu_count() or 1, 8)
    examine = check_image if decodes_images else image_size
    good: list[CheckedSample] = []
    with ThreadPoolExecutor(num_threads, thread_name_prefix="image-check") as pool:
        results = _with_image_results(sample_set.samples, pool, examine)
        for done, (sample, image_results) in enumerate(results, start=1):
            try:
                sizes = tuple(_size_or_raise(result) for result in image_results)
                good.append(CheckedSample(sample, encoder.measure(sample), sizes))
            except SampleProblem as problem:
                quarantine.add(sample.source, sample.sample_id, problem)
            if on_progress is not None:
                on_progress(done, len(sample_set.samples))
    quarantine.write()
    bad = (*sample_set.bad, *quarantine.records[num_before:])
    _refuse_too_many_bad(bad, len(bad) + len(good), max_bad_fraction, quarantine.path)
    return good


_ImageResult = tuple[int, int] | SampleProblem
_Examine = Callable[[ImagePart], tuple[int, int]]


def _with_image_results(
    samples: Sequence[Sample], pool: ThreadPoolExecutor, examine: _Examine
) -> Iterator[tuple[Sample, list[_ImageResult]]]:
    """Each sample with what was found of its images, in order; the pool works ahead of what is asked for."""
    known: dict[Hashable, _ImageResult] = {}
    pending: dict[Hashable, Future[_ImageResult]] = {}
    ahead = iter(samples)
    for sample in itertools.islice(ahead, _NUM_AHEAD):
        _submit(sample, pool, examine, known, pending)
    for sample in samples:
        for next_sample in itertools.islice(ahead, 1):
            _submit(next_sample, pool, examine, known, pending)
        keys = [_key(part) for part in sample.images]
        for key in keys:
            if key in pending:
                known[key] = pending.pop(key).result()
        yield sample, [known[key] for key in keys]


def _submit(
    sample: Sample,
    pool: ThreadPoolExecutor,
    examine: _Examine,
    known: Mapping[Hashable, _ImageResult],
    pending: dict[Hashable, Future[_ImageResult]],
) -> None:
    """Have the pool examine those images of `sample` that it has not been given yet."""
    for part in sample.images:
        key = _key(part)
        if key not in known and key not in pending:
            pending[key] = pool.submit(_result_of, examine, part)


def _key(part: ImagePart) -> Hashable:
    """What stands for an image while results are kept: not its bytes, which would fill the memory."""
    return part.path if part.path is not None else hashlib.sha256(part.data or b"").digest()


def _result_of(examine: _Examine, part: ImagePart) -> _ImageResult:
    try:
        return examine(part)
    except SampleProblem as problem:
        return problem


def _size_or_raise(result: _ImageResult) -> tuple[int, int]:
    if isinstance(result, SampleProblem):
        raise result
    return result


def _refuse_too_many_bad(
    bad: Sequence[QuarantineRecord], num_records: int, max_bad_fraction: float, quarantine_path: Path
) -> None:
    """Raise DataError if `bad` is too large a share of `num_records`."""
    num_bad = len(bad)
    if num_bad < num_records and num_bad <= max_bad_fraction * num_records:
        if num_bad:
            logger.warning("%d of %d samples set aside, see %s", num_bad, num_records, quarantine_path)
        return
    reasons = "".join(
        f"\n  - {code}: {count} samples, e.g. {first.where}: {first.reason}" for code, count, first in commonest(bad, 3)
    )
    raise DataError(
        f"{num_bad} of {num_records} samples ({100 * num_bad / max(num_records, 1):.1f} %) can't be used; "
        f"the commonest reasons:{reasons}",
        expected=f"at most {100 * max_bad_fraction:g} % bad samples (data.max_bad_fraction = {max_bad_fraction:g})",
        next_step=f"correct the samples listed in {quarantine_path}, or raise data.max_bad_fraction to go on without",
    )
