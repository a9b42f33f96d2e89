"""Greedy answers to the questions of validation samples."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from eightgig.data.batch import EncodedSample, MicroBatch
from eightgig.data.collate import collate
from eightgig.data.encode import Encoder
from eightgig.data.sample import Message, Sample, images_of
from eightgig.evaluate.metrics import exact_match
from eightgig.step.step import Compute


@dataclass(frozen=True)
class Generation:
    """One question, the answer hoped for and the answer given."""

    sample_id: str
    images: tuple[str, ...]
    question: str
    expected: str
    answer: str

    @property
    def correct(self) -> bool:
        """Whether the answer matches exactly."""
        return exact_match(self.answer, self.expected) == 1.0


def first_exchange(sample: Sample) -> tuple[tuple[Message, ...], str]:
    """The messages before the first answer of `sample`, and that answer."""
    for index, message in enumerate(sample.messages):
        if message.role == "assistant":
            return sample.messages[:index], message.text
    raise AssertionError(f"sample {sample.sample_id} has no answer, which the data check should have found")


def generate_answers(
    model: Any, encoder: Encoder, samples: Sequence[Sample], compute: Compute, *, batch_size: int, max_new_tokens: int
) -> list[Generation]:
    """Greedy answers of `model` to the first question of each sample, in the order of `samples`.

    Prompts of equal length share a batch of at most `batch_size`: no padding, so an answer does not depend on its
    neighbours' lengths. Each prompt of a batch adds a key-value cache (0.5 MiB a token for a 7B model), so what fits
    in training need not fit here with more prompts than training has rows.
    """
    exchanges = [first_exchange(sample) for sample in samples]
    prompts = [encoder.encode_prompt(messages) for messages, _ in exchanges]
    answers: dict[int, str] = {}
    for indices in _batches_of_equal_shape(prompts, batch_size):
        texts = answer_prompts(model, encoder, [prompts[i] for i in indices], compute, max_new_tokens=max_new_tokens)
        answers.update(zip(indices, texts, strict=True))
    return [
        Generation(
            sample_id=sample.sample_id,
            images=tuple(str(image) for image in images_of(messages)),
            question="\n".join(message.text for message in messages if message.role == "user"),
            expected=expected,
            answer=answers[index],
        )
        for index, (sample, (messages, expected)) in enumerate(zip(samples, exchanges, strict=True))
    ]


def answer_prompts(
    model: Any, encoder: Encoder, prompts: Sequence[EncodedSample], compute: Compute, *, max_new_tokens: int
) -> list[str]:
    """Greedy answers to `prompts`, which must all have the same number of tokens; leaves the model's mode as found."""
    batch = collate(prompts, encoder.pad_token_id, encoder.image_layout)
    return answer_batch(model, encoder, batch, compute, max_new_tokens=max_new_tokens)


def answer_batch(
    model: Any, encoder: Encoder, batch: MicroBatch, compute: Compute, *, max_new_tokens: int
) -> list[str]:
    """Greedy answers to the prompts of `batch`, which has no padding; leaves the model's mode as found."""
    tokenizer = encoder.tokenizer
    batch = batch.to(compute.device, compute.input_dtype)
    was_training = model.training
    model.eval()
    with torch.no_grad(), compute.autocast():
        answers = encoder.family.generate(
            model,
            batch.model_inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            use_cache=True,
            eos_token_id=encoder.end_token_ids,
            pad_token_id=encoder.pad_token_id,
        )
    model.train(was_training)
    return [tokenizer.decode(row, skip_special_tokens=True).strip() for row in answers]


def _batches_of_equal_shape(prompts: Sequence[EncodedSample], batch_size: int) -> Iterable[list[int]]:
    by_shape: dict[tuple[int, int], list[int]] = defaultdict(list)
    for index, prompt in enumerate(prompts):
        by_shape[prompt.input_ids.numel(), prompt.num_images].append(index)
    for indices in by_shape.values():
        for start in range(0, len(indices), batch_size):
            yield indices[start : start + batch_size]
