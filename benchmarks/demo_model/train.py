"""Pretrains the embedded model on rendered scenes: `python -m benchmarks.demo_model.train OUT --seconds 420`.

Writes the weights in bf16 (in two files, each under 16 MiB), the tokenizer and a record. `assemble.py` makes the model
folder of them.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from benchmarks.demo_model.architecture import PretrainingForward, build_model
from benchmarks.demo_model.conversation import RowEncoder, image_position, train_tokenizer
from benchmarks.demo_model.feed import Batch, SceneBatches, scene_loader
from benchmarks.demo_model.held_out import measure_held_out
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration, set_seed

_NUM_WEIGHT_FILES = 2
_RATE_STEPS = 60


@dataclass(frozen=True)
class Pretraining:
    """What the run was asked for. `steps` 0 means: as many as fit in `seconds`, by the rate of the first steps."""

    seed: int
    batch_size: int
    seconds: float
    steps: int
    learning_rate: float
    weight_decay: float
    warmup_steps: int
    max_grad_norm: float
    num_workers: int


def learning_rate_at(step: int, num_steps: int, settings: Pretraining) -> float:
    """Linear warm-up, then a cosine down to a hundredth of the peak."""
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    done = min(1.0, (step - settings.warmup_steps) / max(1, num_steps - settings.warmup_steps))
    return settings.learning_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))


class Stepper:
    """One optimisation step a call; on CUDA the whole step is captured once and replayed as one graph."""

    def __init__(self, forward: PretrainingForward, settings: Pretraining, first: Batch) -> None:
        self.forward, self.settings = forward, settings
        device = next(forward.parameters()).device
        self.learning_rate = torch.tensor(settings.learning_rate, device=device)
        decayed = [weight for weight in forward.parameters() if weight.ndim > 1]
        others = [weight for weight in forward.parameters() if weight.ndim <= 1]
        groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(
            groups, lr=self.learning_rate, betas=(0.9, 0.98), fused=True, capturable=device.type == "cuda"
        )
        self.inputs = [tensor.to(device) for tensor in (first.pixels, first.ids, first.is_target)]
        self.loss = torch.zeros((), device=device)
        self.run: Callable[[], None] = self._capture() if device.type == "cuda" else self._step

    def __call__(self, batch: Batch, learning_rate: float) -> torch.Tensor:
        """The loss of `batch`, on the device, before the step."""
        for held, new in zip(self.inputs, (batch.pixels, batch.ids, batch.is_target), strict=True):
            held.copy_(new, non_blocking=True)
        self.learning_rate.fill_(learning_rate)
        self.run()
        return self.loss

    def _step(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.inputs[0].device.type, dtype=torch.bfloat16):
            loss = self.forward(*self.inputs)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.forward.parameters(), self.settings.max_grad_norm)
        self.optimizer.step()
        self.loss.copy_(loss.detach())

    def _capture(self) -> Callable[[], None]:
        self.learning_rate.fill_(0.0)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self._step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._step()
        return graph.replay


def save_weights(model: LlavaForConditionalGeneration, folder: Path) -> None:
    """Writes the weights in bf16, split in files that the lent machine can send back."""
    weights = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in model.state_dict().items()}
    names = sorted(weights)
    for index in range(_NUM_WEIGHT_FILES):
        save_file(
            {name: weights[name] for name in names[index::_NUM_WEIGHT_FILES]}, folder / f"weights-{index}.safetensors"
        )


def load_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The state dict that `save_weights` wrote."""
    files = [folder / f"weights-{index}.safetensors" for index in range(_NUM_WEIGHT_FILES)]
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def pretrain(settings: Pretraining, device: torch.device, out: Path, start_from: Path | None) -> dict[str, object]:
    """Runs the training, writes weights and tokenizer to `out`, and returns the record's figures."""
    set_seed(settings.seed)
    tokenizer = train_tokenizer()
    tokenizer.backend_tokenizer.save(str(out / "tokenizer.json"))
    encoder = RowEncoder(tokenizer)
    model = build_model(tokenizer)
    if start_from is not None:
        model.load_state_dict({name: tensor.float() for name, tensor in load_weights(start_from).items()})
    forward = PretrainingForward(model, image_position(tokenizer)).to(device)
    batches = SceneBatches(tokenizer, (settings.seed + 1) << 32, settings.batch_size)
    loader = iter(scene_loader(batches, settings.num_workers, pin=device.type == "cuda"))
    stepper = Stepper(forward, settings, next(loader))
    figures = _run_steps(stepper, loader, settings, encoder, out)
    save_weights(model, out)
    num_scenes = 20_000 if device.type == "cuda" else 200
    return {**figures, "held_out_exact_match": measure_held_out(forward, encoder, num_scenes)}


def _run_steps(
    stepper: Stepper, loader: object, settings: Pretraining, encoder: RowEncoder, out: Path
) -> dict[str, object]:
    num_steps = settings.steps or 1_000_000
    curve = []
    start_s = time.perf_counter()
    step = 0
    while step < num_steps:
        loss = stepper(next(loader), learning_rate_at(step, num_steps, settings))
        step += 1
        if step == _RATE_STEPS:
            loss.item()
            rate_start_s = time.perf_counter()
        if step == 2 * _RATE_STEPS and not settings.steps:
            loss.item()
            step_s = (time.perf_counter() - rate_start_s) / _RATE_STEPS
            num_steps = step + int((settings.seconds - (time.perf_counter() - start_s)) / (step_s * 1.04))
            print(f"{step_s * 1e3:.1f} ms a step, {num_steps} steps to do", flush=True)
        if step % 2000 == 0 or step == num_steps:
            exact_match = measure_held_out(stepper.forward, encoder, 1500)["all"]
            curve.append([step, round(loss.item(), 4), exact_match])
            print(
                f"step {step} {time.perf_counter() - start_s:.0f} s loss {loss.item():.4f} held out {exact_match}",
                flush=True,
            )
        if step % 4000 == 0:
            save_weights(stepper.forward.model, out)
    return {"steps": step, "wall_s": round(time.perf_counter() - start_s, 1), "curve_step_loss_exact_match": curve}


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=420)
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--warmup-steps", type=int, default=300)
    parser.add_argument("--num-workers", type=int, default=12)
    parser.add_argument("--start-from", type=Path)
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> None:
    """Pretrains and writes `OUT/pretraining.json` beside the weights."""
    options = _parse(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    settings = Pretraining(
        seed=options.seed,
        batch_size=options.batch_size,
        seconds=options.seconds,
        steps=options.steps,
        learning_rate=options.learning_rate,
        weight_decay=0.05,
        warmup_steps=options.warmup_steps,
        max_grad_norm=1.0,
        num_workers=options.num_workers,
    )
    figures = pretrain(settings, device, options.out, options.start_from)
    record = {
        "command": "python -m benchmarks.demo_model.train " + " ".join(arguments),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "settings": asdict(settings),
        **figures,
    }
    (options.out / "pretraining.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps({key: record[key] for key in ("steps", "wall_s", "held_out_exact_match")}))


if __name__ == "__main__":
    main(sys.argv[1:])
