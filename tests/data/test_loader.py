"""Batches from worker processes: the same however they are started, from any step on, for any process."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from tests.tiny import write_llava_jsonl
from transformers import LlavaProcessor

from eightgig.config import Batching
from eightgig.core.errors import DataError, EnvironmentProblem
from eightgig.data import encode
from eightgig.data.batch import EncodedSample, MicroBatch
from eightgig.data.collate import pack
from eightgig.data.encode import Encoder
from eightgig.data.grouping import Grouping
from eightgig.data.loader import StepLoader, WorkerSettings, validation_batches
from eightgig.data.order import StepOrder
from eightgig.data.quarantine import Quarantine
from eightgig.data.sample import ImagePart, Sample
from eightgig.data.sources import load_samples
from eightgig.data.workers import WorkersFailed, next_of
from eightgig.registry.llava import LlavaFamily

NUM_SAMPLES = 11


@pytest.fixture
def samples(tmp_path: Path, quarantine: Quarantine) -> tuple[Sample, ...]:
    return load_samples(write_llava_jsonl(tmp_path, NUM_SAMPLES), None, quarantine).samples


@pytest.fixture
def order() -> StepOrder:
    """Eleven samples in steps of 2 × 3: two steps an epoch, the second with batches of 2, 2 and 1."""
    return StepOrder(NUM_SAMPLES, batch_size=2, accumulation=3, seed=7)


def assert_same(left: Sequence[list[MicroBatch]], right: Sequence[list[MicroBatch]]) -> None:
    assert [[batch.sample_ids for batch in step] for step in left] == [
        [batch.sample_ids for batch in step] for step in right
    ]
    for one, other in zip(left, right, strict=True):
        for first, second in zip(one, other, strict=True):
            assert torch.equal(first.labels, second.labels)
            assert first.model_inputs.keys() == second.model_inputs.keys()
            for name, tensor in first.model_inputs.items():
                assert torch.equal(tensor, second.model_inputs[name])


def test_batches_are_what_the_order_says(samples: tuple[Sample, ...], encoder: Encoder, order: StepOrder) -> None:
    steps = list(StepLoader(samples, encoder, order, steps=range(4)))
    assert [[len(batch.sample_ids) for batch in step] for step in steps] == [[2, 2, 2], [2, 2, 1]] * 2
    for step, batches in enumerate(steps):
        wanted = [[samples[index].sample_id for index in indices] for indices in order.micro_batches(step)]
        assert [list(batch.sample_ids) for batch in batches] == wanted
    assert steps[0][0].model_inputs["pixel_values"].shape == (2, 3, 16, 16)


@pytest.mark.parametrize(("start_method", "num_workers"), [("fork", 2), ("auto", 1), ("spawn", 1), ("forkserver", 1)])
def test_workers_change_nothing(
    samples: tuple[Sample, ...], encoder: Encoder, order: StepOrder, start_method: str, num_workers: int
) -> None:
    inline = list(StepLoader(samples, encoder, order, steps=range(3)))
    workers = WorkerSettings(num_workers, start_method)
    assert_same(list(StepLoader(samples, encoder, order, steps=range(3), workers=workers)), inline)


def test_a_loader_may_be_gone_through_again(samples: tuple[Sample, ...], encoder: Encoder, order: StepOrder) -> None:
    loader = StepLoader(samples, encoder, order, steps=range(2))
    assert len(loader) == 2
    assert_same(list(loader), list(loader))


def test_loading_leaves_the_global_random_state_alone(
    samples: tuple[Sample, ...], encoder: Encoder, order: StepOrder
) -> None:
    """Dropout after a resume must draw what it would have drawn without one."""
    before = torch.get_rng_state()
    list(StepLoader(samples, encoder, order, steps=range(2)))
    list(StepLoader(samples, encoder, order, steps=range(2), workers=WorkerSettings(1, "fork")))
    assert torch.equal(torch.get_rng_state(), before)


def test_starting_late_decodes_nothing_that_was_skipped(
    samples: tuple[Sample, ...], encoder: Encoder, order: StepOrder, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = list(StepLoader(samples, encoder, order, steps=range(6)))
    decoded: list[ImagePart] = []
    load_image = encode.load_image

    def counting(part: ImagePart) -> object:
        decoded.append(part)
        return load_image(part)

    monkeypatch.setattr(encode, "load_image", counting)
    late = StepLoader(samples, encoder, order, steps=range(5, 6))
    assert_same(list(late), whole[5:])
    wanted = [samples[index].images[0] for batch in order.micro_batches(5) for index in batch]
    assert decoded == wanted
    assert len(decoded) == 5


@pytest.mark.parametrize("num_processes", [1, 2])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_samples_that_share_rows(
    samples: tuple[Sample, ...], encoder: Encoder, num_processes: int, num_workers: int
) -> None:
    """Each row is the samples that the order puts into it, end to end; processes share a step's rows."""
    lengths = [encoder.encode(sample).input_ids.numel() for sample in samples]
    order = StepOrder(NUM_SAMPLES, 2, 3, 7, Grouping(Batching.PACKED, 2, lengths))
    shares = [
        list(
            StepLoader(
                samples,
                encoder,
                order,
                steps=range(2),
                workers=WorkerSettings(num_workers, "fork"),
                process_index=index,
                num_processes=num_processes,
            )
        )
        for index in range(num_processes)
    ]
    for step in range(2):
        wanted = [[encoder.encode(samples[index]) for index in row] for row in order.micro_batches(step)]
        assert len(wanted[0]) == 2
        for index, share in enumerate(shares):
            rows = wanted[index::num_processes]
            assert_same([share[step]], [[pack(row) for row in rows]])
            assert [row.segment_lengths for row in share[step]] == [
                tuple(len(each.input_ids) for each in row) for row in rows
            ]


@pytest.mark.parametrize("num_processes", [2, 3])
def test_processes_share_each_step(
    samples: tuple[Sample, ...], encoder: Encoder, order: StepOrder, num_processes: int
) -> None:
    whole = list(StepLoader(samples, encoder, order, steps=range(4)))
    shares = [
        list(StepLoader(samples, encoder, order, steps=range(4), process_index=i, num_processes=num_processes))
        for i in range(num_processes)
    ]
    for step in range(4):
        dealt = [shares[position % num_processes][step][position // num_processes] for position in range(3)]
        assert_same([dealt], [whole[step]])
        assert sum(len(share[step]) for share in shares) == 3


def test_a_process_may_have_no_part_in_an_epochs_last_step(samples: tuple[Sample, ...], encoder: Encoder) -> None:
    order = StepOrder(3, batch_size=1, accumulation=2, seed=0)
    share = list(StepLoader(samples[:3], encoder, order, steps=range(2), process_index=1, num_processes=2))
    assert [len(step) for step in share] == [1, 0]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_image_that_vanished_is_named(
    samples: tuple[Sample, ...], encoder: Encoder, order: StepOrder, num_workers: int
) -> None:
    lost = samples[order.micro_batches(1)[0][1]]
    assert lost.images[0].path is not None
    lost.images[0].path.unlink()
    steps = iter(StepLoader(samples, encoder, order, steps=range(2), workers=WorkerSettings(num_workers, "fork")))
    assert len(next(steps)) == 3
    with pytest.raises(DataError) as caught:
        next(steps)
    assert f"sample {lost.sample_id} ({lost.source}) can't be read any more" in caught.value.found
    assert f"{lost.images[0].path} does not exist" in caught.value.found
    assert "resume" in caught.value.next_step


class _Killed(Encoder):
    """An encoder whose process is ended from outside, as the system does when memory runs out."""

    def encode(self, sample: Sample) -> EncodedSample:
        os.kill(os.getpid(), signal.SIGKILL)
        return super().encode(sample)


def test_a_worker_that_the_system_ends(
    samples: tuple[Sample, ...],
    processor: LlavaProcessor,
    order: StepOrder,
    no_workers_left: Callable[[], bool],
) -> None:
    killed = _Killed(processor, LlavaFamily(), max_length=99)
    loader = StepLoader(samples, killed, order, steps=range(1), workers=WorkerSettings(1, "fork"))
    with pytest.raises(EnvironmentProblem, match="a data worker was ended by the system") as caught:
        next(iter(loader))
    assert "data.num_workers" in caught.value.next_step
    waited_for = [samples[index] for index in order.micro_batches(0)[0]]
    assert "3 times in a row; it was waited for " in caught.value.found
    for sample in waited_for:
        assert f"{sample.sample_id} ({sample.source})" in caught.value.found
    assert no_workers_left()


@pytest.fixture
def no_workers_left() -> Callable[[], bool]:
    """Tells whether all child processes that the test has started have ended, within a short time.

    Those of other tests may live as long as an error of theirs, whose traceback holds their loader.
    """
    others = set(multiprocessing.active_children())

    def tell() -> bool:
        mine = set(multiprocessing.active_children()) - others
        for child in mine:
            child.join(timeout=10)
        return not any(child.is_alive() for child in mine)

    return tell


class _FailingOnce(Encoder):
    """An encoder whose process dies or hangs the first time that it meets each of some samples."""

    def fail_at(self, kind: str, sample_ids: set[str], marks: Path) -> None:
        self.kind, self.sample_ids, self.marks = kind, sample_ids, marks

    def encode(self, sample: Sample) -> EncodedSample:
        mark = self.marks / sample.sample_id
        if sample.sample_id in self.sample_ids and not mark.exists():
            mark.touch()
            if self.kind == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(1000)
        return super().encode(sample)


@pytest.mark.parametrize(("kind", "num_workers"), [("dies", 1), ("dies", 2), ("hangs", 2)])
def test_workers_that_die_or_hang_are_started_again_and_nothing_changes(
    samples: tuple[Sample, ...],
    encoder: Encoder,
    processor: LlavaProcessor,
    order: StepOrder,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    kind: str,
    num_workers: int,
    no_workers_left: Callable[[], bool],
) -> None:
    failing = _FailingOnce(processor, LlavaFamily(), max_length=4096)
    unlucky = [samples[order.micro_batches(step)[batch][0]] for step, batch in ((1, 1), (3, 0))]
    failing.fail_at(kind, {sample.sample_id for sample in unlucky}, tmp_path)
    workers = WorkerSettings(num_workers, "fork", timeout_s=2.0)
    before = signal.getsignal(signal.SIGCHLD)
    assert_same(
        list(StepLoader(samples, failing, order, steps=range(5), workers=workers)),
        list(StepLoader(samples, encoder, order, steps=range(5))),
    )
    assert signal.getsignal(signal.SIGCHLD) == before
    told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(told) == 2
    reason = "ended by the system" if kind == "dies" else "has given nothing for 2 s (data.worker_timeout_s)"
    assert all(reason in text and "start again from there" in text for text in told)
    assert no_workers_left()


class _Broken:
    """Batches of which the next can't be had."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __iter__(self) -> _Broken:
        return self

    def __next__(self) -> MicroBatch:
        raise self.error


@pytest.mark.parametrize("error", [ConnectionResetError("reset"), ConnectionRefusedError("refused"), EOFError()])
def test_a_worker_that_dies_with_its_batch_announced(error: Exception) -> None:
    """The batch's memory is asked for from the worker, over a socket that nobody answers any more."""
    with pytest.raises(WorkersFailed, match="ended by the system"):
        next_of(_Broken(error), None)


def test_an_error_of_a_workers_own_is_no_death() -> None:
    with pytest.raises(ConnectionResetError, match="Caught"):
        next_of(_Broken(ConnectionResetError("Caught ConnectionResetError in DataLoader worker process 0.")), None)


def test_a_worker_that_dies_while_training_computes_raises_nothing_there(
    samples: tuple[Sample, ...],
    encoder: Encoder,
    order: StepOrder,
    no_workers_left: Callable[[], bool],
) -> None:
    """torch would raise an error out of whatever runs when the system tells of the death: a backward pass, say."""
    steps = iter(StepLoader(samples, encoder, order, steps=range(4), workers=WorkerSettings(1, "fork")))
    found = [next(steps)]
    (worker,) = multiprocessing.active_children()
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGKILL)
    worker.join(timeout=10)
    assert sum(range(100_000)) == 4999950000  # the computing
    found += list(steps)
    assert_same(found, list(StepLoader(samples, encoder, order, steps=range(4))))
    assert no_workers_left()


@pytest.mark.parametrize("num_processes", [1, 2])
def test_validation_batches_keep_the_order(samples: tuple[Sample, ...], encoder: Encoder, num_processes: int) -> None:
    shares = [
        list(validation_batches(encoder, samples, batch_size=3, process_index=i, num_processes=num_processes))
        for i in range(num_processes)
    ]
    dealt = [shares[position % num_processes][position // num_processes].sample_ids for position in range(4)]
    assert [sample_id for batch in dealt for sample_id in batch] == [sample.sample_id for sample in samples]
    assert [len(batch) for batch in dealt] == [3, 3, 3, 2]
