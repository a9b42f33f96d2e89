"""`eightgig train`: a whole run, from the config to the report."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType, TracebackType

from eightgig.app.finishing import finish
from eightgig.app.plan_cache import kept_training_plan
from eightgig.app.run_facts import facts_at_start, now_utc
from eightgig.checkpoint.retention import newest_sound_checkpoint
from eightgig.config import TrainingConfig, load_config, save_config
from eightgig.config.levers import AUTO, automatic_paths
from eightgig.core.errors import CheckpointError, DoesNotFit, EightGigError, EnvironmentProblem
from eightgig.core.files import write_json
from eightgig.data.batch import MicroBatch
from eightgig.data.loader import StepLoader, WorkerSettings
from eightgig.data.order import MicroBatchOrder
from eightgig.memory.card import card_of
from eightgig.train.events import RunOutcome, RunStart, SilentListener, TrainingListener
from eightgig.train.fingerprint import fingerprint
from eightgig.train.journal import Journal
from eightgig.train.loop import TrainingLoop
from eightgig.train.planning import FindCard, PlanDoors
from eightgig.train.recovery import Recovery, read_switches
from eightgig.train.rehearsal import Rehearsal
from eightgig.train.run import Run
from eightgig.train.run_folder import RunFolder
from eightgig.train.saving import Saver, resume_from_checkpoint
from eightgig.train.setup import Place, build_run, choose_place
from eightgig.train.step_batches import StepBatches
from eightgig.train.validation import Validator

SILENT = SilentListener()


def train(
    config: TrainingConfig,
    *,
    sources: Mapping[str, str] = MappingProxyType({}),
    run_folder: Path | None = None,
    listener: TrainingListener = SILENT,
    dry_run: bool = False,
    command: str = "eightgig.app.training.train(...)",
    find_card: FindCard = card_of,
) -> RunOutcome:
    """Train as `config` says and return what came of it.

    Args:
        config: the run's settings.
        sources: where each setting came from, for the record.
        run_folder: the folder to make; None = one named by model and time below `config.output_dir`.
        listener: is told what happens, on the main process.
        dry_run: do everything up to the first step, then stop.
        command: what was called or typed, for the record.
        find_card: tells the card behind a device, for which the memory is planned; None = plan nothing.

    Raises:
        EightGigError: whatever stands in the way, with what to do about it.
    """
    place = choose_place(config)
    folder = _new_folder(config, run_folder, place)
    if place.accelerator.is_main_process:
        save_config(config, folder.config)
        write_json(folder.sources, dict(sources))
        folder.update_facts(status="running", started_at=now_utc(), command=command)
    with _StatusKept(folder, place):
        run, told = _prepare(config, place, folder, listener, find_card)
        if dry_run:
            _announce(run, folder, told, steps_done=0)
            return finish(run, folder, told, is_dry_run=True)
        return _run_to_the_end(run, folder, told, steps_done=0)


def resume(
    run_folder: Path,
    *,
    listener: TrainingListener = SILENT,
    command: str = "eightgig.app.training.resume(...)",
    find_card: FindCard = card_of,
) -> RunOutcome:
    """Continue the run in `run_folder` from its newest sound checkpoint to its end; it keeps its plan.

    Raises:
        CheckpointError: there is no run or no usable checkpoint, it is finished, or config, data or trainable weights
            have changed.
    """
    folder = RunFolder.open(run_folder)
    if folder.read_facts().get("status") == "finished":
        raise CheckpointError(
            f"the run {run_folder} is finished",
            expected="a run that was interrupted",
            next_step=f"use it: `eightgig predict {run_folder} --image ... --question ...`, or start a new run",
        )
    config = load_config(folder.config).config
    place = choose_place(config)
    told: TrainingListener = listener if place.accelerator.is_main_process else SilentListener()
    checkpoint = newest_sound_checkpoint(folder.checkpoints, told.on_message)  # before minutes of loading
    if place.accelerator.is_main_process:
        folder.update_facts(status="running", command=command)
    with _StatusKept(folder, place):
        run, told = _prepare(config, place, folder, listener, find_card)
        marks = fingerprint(run.config, run.data.fingerprint, run.trainable)
        steps_done = resume_from_checkpoint(run, checkpoint, marks)
        if place.accelerator.is_main_process:
            folder.forget_after(steps_done)
        return _run_to_the_end(run, folder, told, steps_done=steps_done)


def _new_folder(config: TrainingConfig, wanted: Path | None, place: Place) -> RunFolder:
    """The run's folder: made by the main process, told to the others."""
    path = wanted
    if place.accelerator.is_main_process:
        path = RunFolder.create(wanted, output_dir=config.output_dir, model_name=config.model.name).path
    path = place.as_main_process_has(path)
    assert path is not None
    return RunFolder(path)


@dataclass(frozen=True)
class _StatusKept(contextlib.AbstractContextManager[None]):
    """Keeps run.json true when the run inside ends before its time, and leaves nothing of one that never began."""

    folder: RunFolder
    place: Place

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None or not self.place.accelerator.is_main_process:
            return
        # A full disk takes no status either; the user is to hear of what ended the run, not of that.
        with contextlib.suppress(DoesNotFit, EnvironmentProblem):
            status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
            reason = str(error) or type(error).__name__
            self.folder.update_facts(status=status, finished_at=now_utc(), reason=reason)
            if isinstance(error, EightGigError | KeyboardInterrupt) and not self.folder.has_quarantined:
                self.folder.remove_if_never_begun()


def _prepare(
    config: TrainingConfig, place: Place, folder: RunFolder, listener: TrainingListener, find_card: FindCard
) -> tuple[Run, TrainingListener]:
    told: TrainingListener = listener if place.accelerator.is_main_process else SilentListener()
    run = build_run(config, place, folder, told, PlanDoors(find_card, kept_training_plan))
    if place.accelerator.is_main_process:
        _keep_chosen(config, run.config, folder)
        write_json(folder.receipt, run.loaded.receipt.to_json())
        folder.update_facts(**facts_at_start(run))
    return run, told


def _keep_chosen(given: TrainingConfig, chosen: TrainingConfig, folder: RunFolder) -> None:
    """Write what was chosen for the levers that `given` leaves to the plan, so that the run goes on with the same."""
    paths = automatic_paths(given)
    if not paths:
        return
    save_config(chosen, folder.config)
    sources = json.loads(folder.sources.read_text(encoding="utf-8")) if folder.sources.is_file() else {}
    write_json(folder.sources, {**sources, **dict.fromkeys(sorted(paths), AUTO)})


def _run_to_the_end(run: Run, folder: RunFolder, listener: TrainingListener, *, steps_done: int) -> RunOutcome:
    _announce(run, folder, listener, steps_done=steps_done)
    journal = Journal(folder, listener, is_main=run.accelerator.is_main_process)
    marks = fingerprint(run.config, run.data.fingerprint, run.trainable)
    saver = Saver(run, folder, journal, marks)
    open_loader = partial(_open_loader, run, run.config.data.num_workers)
    batches = StepBatches(run.order, run.num_steps, open_loader)
    recovery = Recovery(run, batches, folder, journal, read_switches(folder), steps_done=steps_done)
    rehearsal = Rehearsal(run, batches, partial(_open_loader, run, 0), saver, journal, recovery)
    loop = TrainingLoop(run, journal, Validator(run, journal), saver, batches, recovery, rehearsal)
    loop.train(steps_done=steps_done)
    return finish(run, folder, listener, is_dry_run=False)


def _announce(run: Run, folder: RunFolder, listener: TrainingListener, *, steps_done: int) -> None:
    receipt = run.loaded.receipt
    listener.on_start(
        RunStart(
            run_folder=folder.path,
            model=run.loaded.spec.name,
            method=run.config.training.method.value,
            device=str(run.step.compute.device),
            precision_note=run.loaded.precision.note,
            steps_planned=run.num_steps,
            first_step=steps_done + 1,
            num_train_samples=len(run.data.train),
            num_validation_samples=len(run.data.validation),
            num_quarantined=run.data.num_quarantined,
            num_cut_samples=run.data.num_cut_prompt_samples + run.data.num_cut_answer_samples,
            num_trainable_parameters=receipt.num_trainable,
            num_parameters=receipt.num_parameters,
            receipt_rows=receipt.to_json()["rows"],
        )
    )


def _open_loader(run: Run, num_workers: int, order: MicroBatchOrder, steps: range) -> Iterator[list[MicroBatch]]:
    loader = StepLoader(
        run.data.train,
        run.encoder,
        order,
        steps=steps,
        workers=WorkerSettings(
            num_workers=num_workers,
            start_method=run.config.data.worker_start_method,
            pin_memory=run.step.compute.device.type == "cuda",
        ),
        process_index=run.accelerator.process_index,
        num_processes=run.accelerator.num_processes,
    )
    return iter(loader)
