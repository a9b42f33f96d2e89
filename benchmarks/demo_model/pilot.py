"""Fine-tunes the embedded model on charts and measures it: `python -m benchmarks.demo_model.pilot MODEL`.

NF4 with double quantisation on the language model's linear layers, fp32 LoRA on them, everything else frozen, on
the CPU or on CUDA. The frozen vision tower runs in every step, as in the product.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import bitsandbytes
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig, set_seed

from eightgig.demo.charts import write_task
from eightgig.demo.settings import DemoSettings

_LINEAR_LAYERS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
_WHOLE_NUMBER = re.compile(r"(1?[0-9]|20)")


@dataclass(frozen=True)
class PilotSettings:
    """One fine-tuning run."""

    seed: int
    steps: int
    batch_size: int
    learning_rate: float
    rank: int
    alpha: int
    dropout: float
    warmup_steps: int
    num_train_images: int
    compute: str


@dataclass(frozen=True)
class Sample:
    """One conversation on one picture: the chat template's text, and the first question with its answer."""

    image: Image.Image
    text: str
    prompt: str
    answer: str


def load_samples(jsonl: Path, processor: AutoProcessor) -> list[Sample]:
    """The samples of a LLaVA-shaped file."""
    samples = []
    for line in jsonl.read_text().splitlines():
        record = json.loads(line)
        messages = []
        for turn in record["conversations"]:
            text = turn["value"].removeprefix("<image>\n")
            parts = [{"type": "image"}] if text != turn["value"] else []
            role = "user" if turn["from"] == "human" else "assistant"
            messages.append({"role": role, "content": [*parts, {"type": "text", "text": text}]})
        with Image.open(jsonl.parent / record["image"]) as image:
            samples.append(
                Sample(
                    image.convert("RGB"),
                    processor.apply_chat_template(messages),
                    processor.apply_chat_template(messages[:1], add_generation_prompt=True),
                    messages[1]["content"][0]["text"],
                )
            )
    return samples


def load_4bit_model(folder: Path, compute: torch.dtype, device: torch.device) -> torch.nn.Module:
    """The model with its language model's linear layers in NF4 and everything else in `compute`."""
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
        llm_int8_skip_modules=["model.vision_tower", "model.multi_modal_projector", "lm_head"],
    )
    model = AutoModelForImageTextToText.from_pretrained(
        folder, quantization_config=quantization, dtype=compute, device_map={"": device.type}
    )
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            # Evaluation would repack the weights of an AVX512-BF16 machine in place, and gradients after it be wrong.
            module.support_avx512bf16_for_cpu = False
    return model


class Pilot:
    """A loaded model with its adapter, trained and measured on one task."""

    def __init__(self, folder: Path, settings: PilotSettings, device: torch.device) -> None:
        set_seed(settings.seed)
        self.settings, self.device = settings, device
        self.compute = getattr(torch, settings.compute)
        self.processor = AutoProcessor.from_pretrained(folder)
        self.processor.tokenizer.padding_side = "left"
        lora = LoraConfig(
            r=settings.rank, lora_alpha=settings.alpha, lora_dropout=settings.dropout, target_modules=_LINEAR_LAYERS
        )
        self.model = get_peft_model(load_4bit_model(folder, self.compute, device), lora)

    @torch.no_grad()
    def answers(self, images: list[Image.Image], samples: list[Sample]) -> list[str]:
        """Greedy answers to the samples' first questions, each with the image beside it in `images`."""
        self.model.eval()
        answers = []
        for start in range(0, len(samples), 50):
            rows = samples[start : start + 50]
            inputs = self.processor(
                images=images[start : start + 50], text=[row.prompt for row in rows], return_tensors="pt", padding=True
            ).to(self.device)
            inputs["pixel_values"] = inputs["pixel_values"].to(self.compute)
            length = inputs["input_ids"].shape[1]
            ids = self.model.generate(**inputs, do_sample=False, max_new_tokens=8)[:, length:]
            answers += [text.strip() for text in self.processor.batch_decode(ids, skip_special_tokens=True)]
        return answers

    def exact_match(self, samples: list[Sample], images: list[Image.Image] | None = None) -> dict[str, float]:
        """Shares of right and of well-formed answers."""
        answers = self.answers(images or [sample.image for sample in samples], samples)
        right = sum(answer == sample.answer for answer, sample in zip(answers, samples, strict=True))
        well_formed = sum(_WHOLE_NUMBER.fullmatch(answer) is not None for answer in answers)
        return {"exact_match": right / len(samples), "well_formed": well_formed / len(samples)}

    def train(self, samples: list[Sample]) -> dict[str, float]:
        """Trains the adapter; returns the last losses' mean and the seconds a step took."""
        settings = self.settings
        weights = [weight for weight in self.model.parameters() if weight.requires_grad]
        optimizer = torch.optim.AdamW(weights, lr=settings.learning_rate, weight_decay=0.0)
        rng = random.Random(settings.seed)
        order: list[int] = []
        losses = []
        start_s = time.perf_counter()
        self.model.train()
        for step in range(settings.steps):
            if len(order) < settings.batch_size:
                order += rng.sample(range(len(samples)), len(samples))
            rows, order = order[: settings.batch_size], order[settings.batch_size :]
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * self._schedule(step)
            losses.append(self._loss([samples[row] for row in rows]))
            losses[-1].backward()
            losses[-1] = losses[-1].detach()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if (step + 1) % 50 == 0:
                mean_loss = torch.stack(losses[-50:]).mean().item()
                print(f"step {step + 1} {time.perf_counter() - start_s:.0f} s loss {mean_loss:.4f}", file=sys.stderr)
        train_s = time.perf_counter() - start_s
        last_loss = torch.stack(losses[-50:]).mean().item()
        return {"last_loss": last_loss, "train_s": train_s, "step_s": train_s / settings.steps}

    def _schedule(self, step: int) -> float:
        warmup = min(1.0, (step + 1) / self.settings.warmup_steps)
        return warmup * 0.5 * (1 + math.cos(math.pi * step / self.settings.steps))

    def _loss(self, rows: list[Sample]) -> torch.Tensor:
        inputs = self.processor(
            images=[row.image for row in rows],
            text=[row.text for row in rows],
            return_tensors="pt",
            padding=True,
            padding_side="right",
        ).to(self.device)
        inputs["pixel_values"] = inputs["pixel_values"].to(self.compute)
        ids = inputs["input_ids"]
        logits = self.model(**inputs).logits[:, :-1]
        is_target = self._targets(ids)[:, 1:]
        return torch.nn.functional.cross_entropy(logits[is_target].float(), ids[:, 1:][is_target])

    def _targets(self, ids: torch.Tensor) -> torch.Tensor:
        """Whether each token is an answer's: from after `ASSISTANT:` to `</s>`."""
        tokenizer = self.processor.tokenizer
        marker = tokenizer.encode(" ASSISTANT:", add_special_tokens=False)
        is_target = torch.zeros_like(ids, dtype=torch.bool)
        for row, tokens in enumerate(ids.tolist()):
            inside = False
            for place, token in enumerate(tokens):
                is_target[row, place] = inside
                if token == tokenizer.eos_token_id:
                    inside = False
                elif tokens[place - 1 : place + 1] == marker:
                    inside = True
        return is_target


def run_pilot(model_folder: Path, settings: PilotSettings, device: torch.device) -> dict[str, object]:
    """Exact match before and after training on 200 test pictures, with the two controls, and the time."""
    pilot = Pilot(model_folder, settings, device)
    with tempfile.TemporaryDirectory() as folder:
        files = write_task(
            Path(folder), seed=settings.seed, num_train_images=settings.num_train_images, num_validation_images=20
        )
        train, test = (load_samples(file, pilot.processor) for file in (files.train_jsonl, files.test_jsonl))
    before = pilot.exact_match(test)
    training = pilot.train(train)
    blank = [Image.new("RGB", sample.image.size, (240, 240, 240)) for sample in test]
    moved = [sample.image for sample in [*test[1:], test[0]]]
    return {
        "settings": asdict(settings),
        "before": before,
        "after": pilot.exact_match(test),
        "blanked": pilot.exact_match(test, blank)["exact_match"],
        "shuffled": pilot.exact_match(test, moved)["exact_match"],
        **{name: round(value, 4) for name, value in training.items()},
    }


def _parse(arguments: list[str]) -> argparse.Namespace:
    demo = DemoSettings()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=demo.max_steps)
    parser.add_argument("--batch-size", type=int, default=demo.batch_size)
    parser.add_argument("--learning-rate", type=float, default=demo.learning_rate)
    parser.add_argument("--rank", type=int, default=demo.lora_rank)
    parser.add_argument("--alpha", type=int, default=demo.lora_alpha)
    parser.add_argument("--dropout", type=float, default=demo.lora_dropout)
    parser.add_argument("--warmup-steps", type=int, default=demo.warmup_steps)
    parser.add_argument("--num-train-images", type=int, default=demo.num_train_images)
    parser.add_argument("--compute", choices=("bfloat16", "float32"), default="bfloat16")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> None:
    """Runs one pilot and prints its record as one line of JSON."""
    options = vars(_parse(arguments))
    folder = options.pop("model")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(json.dumps(run_pilot(folder, PilotSettings(**options), device)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
