"""A step that runs out of memory anywhere is done again, and comes to what a run came to that was told the levers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.app.listening import Listener
from tests.tiny import build_tiny_llava, write_llava_jsonl
from tests.train.injected_memory import FullAt
from torch import Tensor

from eightgig.app.training import _open_loader
from eightgig.config import TrainingConfig
from eightgig.core.errors import CheckpointError, DoesNotFit
from eightgig.step.build import build_step
from eightgig.train import step_undo
from eightgig.train.journal import Journal
from eightgig.train.loop import TrainingLoop
from eightgig.train.planning import PlanDoors
from eightgig.train.recovery import LeverSwitch, Recovery, Unit, is_out_of_memory, read_switches
from eightgig.train.rehearsal import Rehearsal
from eightgig.train.run import Run
from eightgig.train.run_folder import RunFolder
from eightgig.train.run_levers import LOSS_CHUNK_TOKENS, RunLevers
from eightgig.train.saving import Saver
from eightgig.train.setup import build_run, choose_place
from eightgig.train.step_batches import StepBatches
from eightgig.train.stopping import StopRequest
from eightgig.train.validation import Validator

NUM_STEPS = 2
NUM_ALL_LEVERS = 3  # checkpointing, offloading and single samples: what two short samples of a tiny model can use
Fail = dict[tuple[int, int], int]
"""The operation that fails, by step and by attempt at it (from 0)."""


@dataclass(frozen=True, repr=False)
class Undisturbed:
    """Steps that nothing happened to: the state after them, and the operations of each."""

    state: list[Tensor]
    operations: dict[int, list[str]]


class FailingLoop(TrainingLoop):
    """A loop some of whose attempts run out of memory.

    Attributes:
        operations: of the attempt that went through, by step.
        num_attempts: by step.
    """

    fail: Fail
    num_attempts: dict[int, int]
    operations: dict[int, list[str]]

    def _attempt(self, step: int) -> dict[str, Any]:
        attempt = self.num_attempts.get(step, 0)
        self.num_attempts[step] = attempt + 1
        self.batches.of(step)  # image processors, on the host, reword what goes wrong
        mode = FullAt(self.fail.get((step, attempt)))
        with mode:
            record = super()._attempt(step)
        self.operations[step] = mode.operations
        return record


@dataclass(repr=False)
class Bench:
    """A built run whose first steps can be done again and again.

    Attributes:
        weights: as they were when it was built.
        listener: of the loop at hand.
    """

    run: Run
    folder: RunFolder
    weights: dict[str, Tensor]
    listener: Listener

    def loop(self, fail: Fail, switches: tuple[LeverSwitch, ...] = ()) -> FailingLoop:
        """The loop of the run, put back to its beginning."""
        run, folder = self.run, self.folder
        with torch.no_grad():
            for name, weight in run.trainable.items():
                weight.copy_(self.weights[name])
                weight.grad = None
        config, spec, compute = run.config, run.loaded.spec, run.step.compute
        run.layer_levers.put_on(config)
        run.samples_at_once = None
        run.step = build_step(config, spec, run.model, compute, num_steps=run.num_steps)
        for path in (folder.metrics, folder.recovery):
            path.unlink(missing_ok=True)
        self.listener = Listener()
        journal = Journal(folder, self.listener, is_main=True)
        saver = Saver(run, folder, journal)

        def opened(order: Any, steps: range) -> Iterator[Any]:
            return _open_loader(run, 0, order, steps)

        batches = StepBatches(run.order, run.num_steps, opened)
        recovery = Recovery(run, batches, folder, journal, switches, steps_done=0)
        rehearsal = Rehearsal(run, batches, opened, saver, journal, recovery)
        stop = StopRequest(journal.message)
        loop = FailingLoop(run, journal, Validator(run, journal, stop), saver, stop, recovery, rehearsal)
        loop.fail, loop.num_attempts, loop.operations = fail, {}, {}
        return loop

    def steps(self, fail: Fail, switches: tuple[LeverSwitch, ...] = ()) -> FailingLoop:
        """Do NUM_STEPS steps."""
        loop = self.loop(fail, switches)
        for step in range(1, NUM_STEPS + 1):
            loop._step(step)
        return loop

    def state(self) -> list[Tensor]:
        """Everything that the next step starts from, and what was logged of those before."""
        optimizer = self.run.step.optimizer
        tensors = [weight.detach().clone() for weight in self.run.trainable.values()]
        for weight in self.run.trainable.values():
            assert weight.grad is None
            tensors += [value.clone() for value in optimizer.state[weight].values()]
        lines = [json.loads(line) for line in self.folder.metrics.read_text().splitlines()]
        logged = [(line["loss"], line["grad_norm"], line["learning_rate"]) for line in lines if line["kind"] == "step"]
        rates = [*self.run.step.scheduler.get_last_lr(), *(group["lr"] for group in optimizer.param_groups)]
        return [*tensors, torch.tensor(logged, dtype=torch.float64), torch.tensor(rates, dtype=torch.float64)]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder = tmp_path_factory.mktemp("bench")
    config = TrainingConfig.model_validate(
        {
            "model": {"name": str(build_tiny_llava(folder / "model"))},
            "data": {"data_path": str(write_llava_jsonl(folder / "data", 9)), "num_workers": 0},
            "training": {
                "batch_size": 2,
                "gradient_accumulation_steps": 2,
                "max_steps": 5,
                "learning_rate": 5e-3,
                "lora": {"rank": 4, "dropout": 0.3},  # every generator's state matters
            },
            # Two layers, of which one is checkpointed: there is a lever left that changes no number.
            "hardware": {"device": "cpu", "mixed_precision": "fp32", "checkpointed_layers": 1},
        }
    )
    run_folder = RunFolder(folder / "run")
    run_folder.path.mkdir()
    run = build_run(config, choose_place(config), run_folder, Listener(), PlanDoors(lambda device: None))
    weights = {name: weight.detach().clone() for name, weight in run.trainable.items()}
    return Bench(run, run_folder, weights, Listener())


@pytest.fixture(scope="module")
def undisturbed(bench: Bench) -> Undisturbed:
    bench.steps({})  # some things are made but once
    loop = bench.steps({})
    assert not bench.folder.recovery.exists()
    return Undisturbed(bench.state(), loop.operations)


def _assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


@settings(max_examples=12)
@given(step=st.integers(1, NUM_STEPS), part=st.floats(0, 1, exclude_max=True))
def test_a_step_that_fails_once_anywhere_is_as_if_it_had_not(
    bench: Bench, undisturbed: Undisturbed, step: int, part: float
) -> None:
    loop = bench.steps({(step, 0): int(part * len(undisturbed.operations[step]))})
    assert loop.num_attempts == {1: 1, 2: 1} | {step: 2}
    _assert_same(bench.state(), undisturbed.state)
    assert not bench.folder.recovery.exists()


@pytest.mark.parametrize(
    ("step", "operation"),
    [
        (1, "zeros_like"),  # a state of the optimizer
        (1, "_fused_adamw_"),
        (1, "_record_function_exit"),  # behind it
        (2, "copy_"),  # what is kept for going back
        (2, "_foreach_add_"),  # the states' counters of steps
        (2, "_fused_adamw_"),
        (2, "_record_function_exit"),
    ],
)
def test_an_update_is_whole_or_not_there(bench: Bench, undisturbed: Undisturbed, step: int, operation: str) -> None:
    operations = undisturbed.operations[step]
    last = max(number for number, name in enumerate(operations) if operation in name)
    assert last > 0.9 * len(operations)
    loop = bench.steps({(step, 0): last})
    assert operation in bench.listener.texts[0]
    assert loop.num_attempts[step] == 2
    _assert_same(bench.state(), undisturbed.state)


@settings(max_examples=6)
@given(
    step=st.integers(1, NUM_STEPS),
    parts=st.lists(st.floats(0, 0.8), min_size=2, max_size=1 + NUM_ALL_LEVERS),
)
def test_levers_found_on_the_way_are_as_levers_that_were_told(
    bench: Bench, undisturbed: Undisturbed, step: int, parts: list[float]
) -> None:
    num_operations = len(undisturbed.operations[step])
    bench.steps({(step, attempt): int(part * num_operations) for attempt, part in enumerate(parts)})
    found, switches = bench.state(), read_switches(bench.folder)
    assert [switch.unit for switch in switches] == [Unit(step, "train", "train")] * (len(parts) - 1)
    assert bench.folder.read_facts()["levers_switched_on"][-1]["change"] == switches[-1].change
    logged = [json.loads(line) for line in bench.folder.metrics.read_text().splitlines()]
    assert [line["change"] for line in logged if line["kind"] == "recovery"] == [s.change for s in switches]

    told = bench.steps({}, switches)
    assert told.num_attempts == {1: 1, 2: 1}
    _assert_same(bench.state(), found)
    again = [json.loads(line) for line in bench.folder.metrics.read_text().splitlines()]
    assert [line["change"] for line in again if line["kind"] == "recovery"] == [s.change for s in switches]


def test_smaller_passes_learn_the_same_from_the_same_samples(bench: Bench) -> None:
    """The loss is a sum over target tokens, whichever passes they come in; only dropout draws otherwise."""
    plain = RunLevers.of(bench.run.config)
    single = LeverSwitch(Unit(1, "train", "train"), "one by one", RunLevers(**{**vars(plain), "samples_at_once": 1}))
    bench.run.model.apply(_no_dropout)
    try:
        bench.steps({})
        expected = bench.state()
        loop = bench.steps({}, (single,))
        found = bench.state()
    finally:
        bench.run.model.apply(_dropout)
    assert [len(batch.sample_ids) for batch in loop.batches.of(NUM_STEPS)] == [1, 1, 1, 1]
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=2e-5)


def _no_dropout(module: torch.nn.Module) -> None:
    if isinstance(module, torch.nn.Dropout):
        module.p = 0.0


def _dropout(module: torch.nn.Module) -> None:
    if isinstance(module, torch.nn.Dropout):
        module.p = 0.3


def test_without_a_lever_left_it_says_what_was_tried_and_on_what(bench: Bench) -> None:
    with pytest.raises(DoesNotFit) as caught:
        bench.steps({(2, attempt): 100 for attempt in range(9)})
    text = str(caught.value)
    assert "ran out of memory in step 2, and no lever on its memory is left" in text
    assert "tried: all layers are checkpointed; layer inputs wait on the host; 1 sample goes through at a time" in text
    assert "samples of the largest micro-batch: train-" in text
    assert "start again" in text  # no checkpoint was written
    assert len(read_switches(bench.folder)) == NUM_ALL_LEVERS


def test_a_step_gets_its_plain_second_try_once_in_a_run(bench: Bench) -> None:
    bench.steps({(1, 0): 10, (2, 0): 10})
    (switch,) = read_switches(bench.folder)
    assert switch.unit == Unit(2, "train", "train")
    assert [text for text in bench.listener.texts if "again with all unused memory" in text] == [
        "trying step 1 again with all unused memory given back"
    ]


def test_an_update_too_large_to_keep_ends_the_run_rather_than_half_done(
    bench: Bench, undisturbed: Undisturbed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_undo, "MAX_KEPT_BYTES", 0)
    loop = bench.steps({(1, 0): 10})  # before the update nothing was to be kept
    _assert_same(bench.state(), undisturbed.state)
    last = len(loop.operations[2]) - 1
    with pytest.raises(DoesNotFit, match="the update had begun"):
        bench.steps({(2, 0): last})


def test_other_errors_pass(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = bench.loop({})
    monkeypatch.setattr(loop, "_attempt", lambda step: (_ for _ in ()).throw(RuntimeError("shapes differ")))
    with pytest.raises(RuntimeError, match="shapes differ"):
        loop._step(1)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("CUDA error: out of memory\nCompile with `TORCH_USE_CUDA_DSA`", True),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
        ("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED.", False),
        ("[enforce fail at alloc_cpu.cpp:114] DefaultCPUAllocator: can't allocate memory: you tried to allocate", True),
        ("The size of tensor a (3) must match", False),
    ],
)
def test_what_counts_as_out_of_memory(text: str, expected: bool) -> None:
    assert is_out_of_memory(RuntimeError(text)) is expected
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))


@pytest.mark.parametrize("content", ["[", "[1]", '[{"unit": {}}]', "\xff"])
def test_a_damaged_record_of_levers_is_named(tmp_path: Path, content: str) -> None:
    folder = RunFolder(tmp_path)
    assert read_switches(folder) == ()
    folder.recovery.write_bytes(content.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"recovery\.json is damaged"):
        read_switches(folder)


def test_the_loss_takes_smaller_chunks_from_the_switch_on(bench: Bench) -> None:
    levers = RunLevers(**{**vars(RunLevers.of(bench.run.config)), "loss_chunk_tokens": LOSS_CHUNK_TOKENS})
    before = bench.run.step.compute
    try:
        bench.steps({}, (LeverSwitch(Unit(2, "train", "train"), "chunks", levers),))
        assert bench.run.step.compute.loss_chunk_tokens == LOSS_CHUNK_TOKENS
    finally:
        bench.run.step.compute = before


def test_a_rehearsal_leaves_weights_states_and_rates_as_they_were(bench: Bench) -> None:
    """Before the first step, where there are no states, and between steps, where there are."""
    loop = bench.steps({})
    expected, optimizer = bench.state(), bench.run.step.optimizer
    seen: list[int] = []

    def saved() -> None:
        seen.append(len(optimizer.state))

    loop.rehearsal._saver.rehearse = saved  # type: ignore[method-assign]
    loop.rehearsal(NUM_STEPS)
    _assert_same(bench.state(), expected)

    loop = bench.loop({})
    optimizer = bench.run.step.optimizer
    loop.rehearsal._saver.rehearse = saved  # type: ignore[method-assign]
    loop.rehearsal(0)
    assert seen == [len(bench.weights)] * 2  # with all states there
    assert not optimizer.state
    for step in range(1, NUM_STEPS + 1):
        loop._step(step)
    _assert_same(bench.state(), expected)


def test_where_no_copy_can_be_kept_a_rehearsal_makes_no_update(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_undo, "MAX_KEPT_BYTES", 0)
    loop = bench.loop({})
    optimizer, num_states = bench.run.step.optimizer, []
    monkeypatch.setattr(loop.rehearsal._saver, "rehearse", lambda: num_states.append(len(optimizer.state)))
    loop.rehearsal(0)
    assert num_states == [0]
    assert all(torch.equal(weight, bench.weights[name]) for name, weight in bench.run.trainable.items())


def test_the_last_checkpoint_is_named_where_no_lever_is_left(bench: Bench) -> None:
    loop = bench.loop({(1, attempt): 10 for attempt in range(9)})
    checkpoint = bench.folder.checkpoints / "step-00000004"
    checkpoint.mkdir(parents=True)
    try:
        with pytest.raises(DoesNotFit) as caught:
            loop._step(1)
    finally:
        checkpoint.rmdir()
    assert f"go on from {checkpoint} with `eightgig train --resume {bench.folder.path}`" in str(caught.value)
