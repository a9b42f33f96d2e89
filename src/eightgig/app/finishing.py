"""The end of a run: save the result, prove in a fresh process that it works, and write the report."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from eightgig.app.reporting import write_report
from eightgig.app.run_facts import now_utc
from eightgig.config import TrainingMethod
from eightgig.core.files import write_json
from eightgig.data.loader import validation_batches
from eightgig.export.adapter import save_adapter, save_full_model
from eightgig.export.reference import write_reference
from eightgig.export.verify import reload_plan, verify_in_fresh_process
from eightgig.train.events import RunOutcome, TrainingListener
from eightgig.train.history import summarise
from eightgig.train.plan_check import memory_line, planned_record
from eightgig.train.run import Run
from eightgig.train.run_folder import RunFolder, read_jsonl

NUM_REFERENCE_SAMPLES = 4  # enough to tell a wrong adapter; each costs one forward pass here and one there


def finish(run: Run, folder: RunFolder, listener: TrainingListener, *, is_dry_run: bool) -> RunOutcome:
    """What the run came to. After a dry run nothing is saved; on all but the main process nothing is written.

    The model is given up here: proving the result in another process needs the GPU's memory.
    """
    if is_dry_run or not run.accelerator.is_main_process:
        outcome = _outcome(
            folder, status="dry run" if is_dry_run else "finished", saved=None, verification=None, peak={}
        )
        if run.accelerator.is_main_process:
            folder.update_facts(status=outcome.status, finished_at=now_utc())
    else:
        outcome = _save_and_prove(run, folder, listener)
    listener.on_finish(outcome)
    return outcome


def _save_and_prove(run: Run, folder: RunFolder, listener: TrainingListener) -> RunOutcome:
    measured = run.meter.record(
        run.loaded.receipt,
        run.trainable,
        run.step.optimizer,
        run.loaded.streamed,
        is_tower_off=run.fed is not None,
    )
    peak = measured | planned_record(run)
    write_json(folder.memory, peak)
    line = memory_line(run)
    if line is not None:
        listener.on_message(line)
    run.take_tower_back()  # what is saved is proved with pixels, and a whole model is saved with its tower
    saved = _save(run, folder)
    verification = _prove(run, folder, saved, listener)
    write_json(folder.verification, verification)
    outcome = _outcome(folder, status="finished", saved=saved, verification=verification, peak=peak)
    folder.update_facts(
        status=outcome.status, finished_at=now_utc(), steps_done=outcome.steps_done, train_s=outcome.train_s
    )
    write_report(folder.path)
    return outcome


def _save(run: Run, folder: RunFolder) -> Path:
    if run.config.training.method is TrainingMethod.FULL:
        path = folder.path / "model"
        save_full_model(run.model, run.loaded.processor, path)
    else:
        path = folder.path / "adapter"
        save_adapter(run.model, path)
    return path


def _prove(run: Run, folder: RunFolder, saved: Path, listener: TrainingListener) -> dict[str, Any]:
    reference = folder.path / "reference.safetensors"
    samples = (run.data.validation or run.data.train)[:NUM_REFERENCE_SAMPLES]
    write_reference(run.loaded, list(validation_batches(run.encoder, samples, batch_size=1)), reference)
    plan = reload_plan(run.config, run.loaded.spec, run.loaded.device, run.loaded.precision, saved)
    listener.on_message("loading the saved result in a fresh process, to compare its answers with the trained model's")
    run.give_up_model()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    verification = verify_in_fresh_process(plan, reference)
    reference.unlink()
    return asdict(verification)


def _outcome(
    folder: RunFolder,
    *,
    status: str,
    saved: Path | None,
    verification: Mapping[str, Any] | None,
    peak: Mapping[str, Any],
) -> RunOutcome:
    history = summarise(read_jsonl(folder.metrics))
    return RunOutcome(
        run_folder=folder.path,
        adapter_folder=saved,
        report_path=folder.report if saved is not None else None,
        steps_done=history.steps_done,
        status=status,
        train_s=history.train_s,
        final_loss=history.final_loss,
        exact_match_before=history.exact_match_before,
        exact_match_after=history.exact_match_after,
        verification=verification,
        peak=peak,
    )
