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
from eightgig.checkpoint.retention import (
    checkpoint_paths,
    forget_best_after,
    newest_sound_checkpoint,
    remove_unfinished,
)
from eightgig.config import TrainingConfig, WhenDiskIsFull, load_config, save_config
from eightgig.config.levers import AUTO, automatic_paths
from eightgig.core.errors import CheckpointError, DoesNotFit, EightGigError, EnvironmentProblem
from eightgig.core.files import remove_leftovers, write_json
from eightgig.data.batch import MicroBatch
from eightgig.data.loader import StepLoader, WorkerSettings
from eightgig.data.order import MicroBatchOrder
from eightgig.memory.card import card_of
from eightgig.train.events import RunOutcome, RunStart, SilentListener, TrainingListener
from eightgig.train.journal import Journal
from eightgig.train.loop import TrainingLoop
from eightgig.train.planning import FindCard, PlanDoors
from eightgig.train.recovery import Recovery, read_switches
from eightgig.train.rehearsal import Rehearsal
from eightgig.train.run import Run
from eightgig.train.run_folder import RunFolder, read_jsonl
from eightgig.train.run_lock import only_writer
from eightgig.train.saving import Saver, resume_from_checkpoint
from eightgig.train.setup import Place, build_run, choose_place
from eightgig.train.step_batches import StepBatches
from eightgig.train.stopping import StopRequest, heeding_signals
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
        RunStopped: Ctrl-C or SIGTERM stopped the run; `resume` goes on. A KeyboardInterrupt as any Ctrl-C.
    """
    with heeding_signals(listener.on_message) as stop:
        place = choose_place(config)
        folder = _new_folder(config, run_folder, place)
        with _writing(folder, place), _StatusKept(folder, place, gives_folder_back=True):
            if place.accelerator.is_main_process:
                folder.update_facts(status="running", started_at=now_utc(), command=command)
                save_config(config, folder.config)
                write_json(folder.sources, dict(sources))
            run, told = _prepare(config, place, folder, listener, find_card)
            if dry_run:
                _announce(run, folder, told, steps_done=0)
                return finish(run, folder, told, is_dry_run=True)
            return _run_to_the_end(run, folder, told, stop, steps_done=0)


def resume(
    run_folder: Path,
    *,
    listener: TrainingListener = SILENT,
    command: str = "eightgig.app.training.resume(...)",
    find_card: FindCard = card_of,
) -> RunOutcome:
    """Continue the run in `run_folder` from its newest sound checkpoint to its end; it keeps its plan.

    A run that ended before its first checkpoint was due begins again at step 1, with the same settings.

    Raises:
        CheckpointError: there is no run or no usable checkpoint, it is finished, or config, data or trainable weights
            have changed.
        EnvironmentProblem: another process is training in the folder.
        RunStopped: Ctrl-C or SIGTERM stopped the run.
    """
    folder = RunFolder.open(run_folder)
    if folder.read_facts().get("status") == "finished":
        raise CheckpointError(
            f"the run {run_folder} is finished",
            expected="a run that was interrupted",
            next_step=f"use it: `eightgig predict {run_folder} --image ... --question ...`, or start a new run",
        )
    with heeding_signals(listener.on_message) as stop:
        config = load_config(folder.config).config
        place = choose_place(config)
        told: TrainingListener = listener if place.accelerator.is_main_process else SilentListener()
        with _writing(folder, place):
            checkpoint = _checkpoint_to_go_on_from(folder, config, told)  # before minutes of loading
            if place.accelerator.is_main_process:
                folder.update_facts(status="running", command=command)
            with _StatusKept(folder, place, gives_folder_back=False):
                run, told = _prepare(config, place, folder, listener, find_card)
                steps_done = 0 if checkpoint is None else resume_from_checkpoint(run, checkpoint, told.on_message)
                if place.accelerator.is_main_process:
                    folder.forget_after(steps_done if checkpoint is not None else -1)
                    forget_best_after(folder.checkpoints, steps_done)
                return _run_to_the_end(run, folder, told, stop, steps_done=steps_done)


def _checkpoint_to_go_on_from(folder: RunFolder, config: TrainingConfig, told: TrainingListener) -> Path | None:
    """The newest sound checkpoint; None where the run ended before the first one was due.

    Raises:
        CheckpointError: there is none, and there was or must have been one.
    """
    steps = [record["step"] for record in read_jsonl(folder.metrics)]
    if not checkpoint_paths(folder.checkpoints) and max(steps, default=0) <= config.checkpoints.every_steps:
        told.on_message("the run ended before its first checkpoint was written: it begins again at step 1")
        return None
    return newest_sound_checkpoint(folder.checkpoints, told.on_message)


@contextlib.contextmanager
def _writing(folder: RunFolder, place: Place) -> Iterator[None]:
    """Be the only run that writes into `folder`, which is tidied of what a killed one left half-written."""
    if not place.accelerator.is_main_process:
        yield
        return
    with only_writer(folder.path):
        remove_leftovers(folder.path)
        remove_unfinished(folder.checkpoints)
        yield


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
    """Keeps run.json true when the run inside ends before its time.

    With `gives_folder_back` nothing is left of one that never began; who resumes a run wants to try again.
    """

    folder: RunFolder
    place: Place
    gives_folder_back: bool

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
            is_users = isinstance(error, EightGigError | KeyboardInterrupt)
            if self.gives_folder_back and is_users and not self.folder.has_quarantined:
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


def _run_to_the_end(
    run: Run, folder: RunFolder, listener: TrainingListener, stop: StopRequest, *, steps_done: int
) -> RunOutcome:
    _announce(run, folder, listener, steps_done=steps_done)
    goes_on_when_full = run.config.checkpoints.when_disk_is_full is WhenDiskIsFull.GO_ON
    journal = Journal(folder, listener, is_main=run.accelerator.is_main_process, goes_on_when_full=goes_on_when_full)
    is_in_log = run.accelerator.is_main_process and folder.has_validated(steps_done)
    is_validated = run.total_over_processes(int(is_in_log))[0] > 0
    saver = Saver(run, folder, journal)
    open_loader = partial(_open_loader, run, run.config.data.num_workers)
    batches = StepBatches(run.order, run.num_steps, open_loader)
    recovery = Recovery(run, batches, folder, journal, read_switches(folder), steps_done=steps_done)
    rehearsal = Rehearsal(run, batches, partial(_open_loader, run, 0), saver, journal, recovery)
    loop = TrainingLoop(run, journal, Validator(run, journal, stop), saver, stop, recovery, rehearsal)
    loop.train(steps_done=steps_done, is_validated=is_validated)
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
            timeout_s=run.config.data.worker_timeout_s,
            pin_memory=run.step.compute.device.type == "cuda",
        ),
        process_index=run.accelerator.process_index,
        num_processes=run.accelerator.num_processes,
    )
    return iter(loader)
