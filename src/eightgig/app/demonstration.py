"""`eightgig demo`: the model in the package learns a task that is new to it, on the road that any user's data takes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from eightgig.app.training import train
from eightgig.config import TrainingConfig, load_config, save_config
from eightgig.demo.charts import TaskFiles, write_task
from eightgig.demo.settings import DemoSettings
from eightgig.train.events import TrainingListener

MODEL = "eightgig-demo"


@dataclass(frozen=True)
class DemoOutcome:
    """What the demonstration showed.

    Attributes:
        before: share of the held-out pictures answered exactly before training.
        after: the same after training.
        num_images: held-out pictures, one question each.
        run: the run's folder.
        train_s: time in optimizer steps and in the validations between and after them.
        next_commands: what to type next, with data of one's own.
    """

    before: float
    after: float
    num_images: int
    run: Path
    adapter_folder: Path
    report_path: Path
    train_s: float
    next_commands: tuple[str, ...]


def run_demo(*, output_dir: Path, seed: int, listener: TrainingListener) -> DemoOutcome:
    """Write the task's pictures below `output_dir`, fine-tune the embedded model on them in 4 bits, and compare.

    Raises:
        EightGigError: the folder can't be written, or the disk is full.
    """
    settings = DemoSettings()
    listener.on_message(f"drawing {settings.num_train_images + settings.num_test_images:,} charts")
    files = write_task(
        output_dir / f"data-{seed}",
        seed=seed,
        num_train_images=settings.num_train_images,
        num_test_images=settings.num_test_images,
    )
    config_file = output_dir / f"config-{seed}.json"
    save_config(demo_config(files, output_dir=output_dir / "runs", seed=seed), config_file)
    resolved = load_config(config_file)  # from here on as with a user's own file
    outcome = train(
        resolved.config,
        sources=resolved.sources,
        run_folder=None,
        listener=listener,
        command=f"eightgig demo --output-dir {output_dir} --seed {seed}",
    )
    assert outcome.exact_match_before is not None
    assert outcome.exact_match_after is not None
    assert outcome.adapter_folder is not None
    assert outcome.report_path is not None
    return DemoOutcome(
        before=outcome.exact_match_before,
        after=outcome.exact_match_after,
        num_images=settings.num_test_images,
        run=outcome.run_folder,
        adapter_folder=outcome.adapter_folder,
        report_path=outcome.report_path,
        train_s=outcome.train_s,
        next_commands=(
            "eightgig train ultra_low_memory --data my-data.jsonl --run-folder runs/mine --dry-run",
            "eightgig train ultra_low_memory --data my-data.jsonl --run-folder runs/mine",
            "eightgig predict runs/mine --image picture.png --question 'What is shown?'",
        ),
    )


def demo_config(files: TaskFiles, *, output_dir: Path, seed: int) -> TrainingConfig:
    """The demonstration's settings as the config that any user could have written.

    The held-out pictures serve as validation data, which decides nothing here: the last weights are the result.
    """
    settings = DemoSettings()
    return TrainingConfig.model_validate(
        {
            "model": {"name": MODEL},
            "training": {
                "batch_size": settings.batch_size,
                "gradient_accumulation_steps": settings.gradient_accumulation_steps,
                "max_steps": settings.max_steps,
                "learning_rate": settings.learning_rate,
                "warmup_ratio": settings.warmup_ratio,
                "weight_decay": settings.weight_decay,
                "max_grad_norm": settings.max_grad_norm,
                "lora": {
                    "rank": settings.lora_rank,
                    "alpha": settings.lora_alpha,
                    "dropout": settings.lora_dropout,
                },
                "quantization": {"load_in_4bit": True},
            },
            "data": {
                "data_path": str(files.train_jsonl),
                "val_path": str(files.test_jsonl),
                "max_length": settings.max_length,
                "image_size": settings.image_size,
                "num_workers": settings.num_workers,
            },
            # The model is so small that recomputing its layers would save nothing worth the time.
            "hardware": {"gradient_checkpointing": False},
            "validation": {
                "every_steps": settings.validate_every_steps,
                "num_generated": settings.num_test_images,
                "max_new_tokens": settings.max_new_tokens,
            },
            "checkpoints": {"every_steps": settings.validate_every_steps},
            "output_dir": str(output_dir),
            "seed": seed,
        }
    )
