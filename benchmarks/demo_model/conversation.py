"""The chat template of the embedded model, its tokenizer, and the rows it is pretrained on."""

from __future__ import annotations

from dataclasses import dataclass, field

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from eightgig.demo.scenes import Question, render_scene

PAD, BOS, EOS, UNKNOWN, IMAGE = "<pad>", "<s>", "</s>", "<unk>", "<image>"
SPECIAL_TOKENS = [PAD, BOS, EOS, UNKNOWN, IMAGE]
MAX_VOCABULARY = 1024
ROW_TOKENS = 112
NUM_CORPUS_SCENES = 12_000
# Seeds of the tokenizer's text, of training and of the held-out scenes never meet.
CORPUS_SEED = 1 << 48
HELD_OUT_SEED = 1 << 52

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ 'USER: ' }}"
    "{% elif message['role'] == 'assistant' %}{{ 'ASSISTANT: ' }}"
    "{% endif %}"
    "{% if message['content'] is string %}{{ message['content'] | trim }}"
    "{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<image>\n' }}{% endif %}{% endfor %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] | trim }}{% endif %}"
    "{% endfor %}"
    "{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ '</s>' }}{% else %}{{ ' ' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def prompt_text(question: str, *, is_first: bool) -> str:
    """The text from `USER:` to `ASSISTANT:` of one turn, as the chat template writes it."""
    image = f"{IMAGE}\n" if is_first else ""
    return f"USER: {image}{question} ASSISTANT:"


def image_position(tokenizer: PreTrainedTokenizerFast) -> int:
    """Where the image token stands in every row."""
    return tokenizer(prompt_text("", is_first=True))["input_ids"].index(tokenizer.convert_tokens_to_ids(IMAGE))


def train_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of at most `MAX_VOCABULARY` tokens, trained on the text of the scenes."""
    tokenizer = Tokenizer(models.BPE(unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=MAX_VOCABULARY,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    bos_id = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, bos_id)]),
        ]
    )
    return as_fast_tokenizer(tokenizer)


def as_fast_tokenizer(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """`tokenizer` with its special tokens named, as transformers wants it."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNKNOWN,
        extra_special_tokens={"image_token": IMAGE},
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )


def _corpus() -> list[str]:
    texts = []
    for seed in range(CORPUS_SEED, CORPUS_SEED + NUM_CORPUS_SCENES):
        for index, question in enumerate(render_scene(seed).questions):
            texts.append(prompt_text(question.text, is_first=index == 0))
            texts.append(f" {question.answer}")
    return texts


@dataclass
class RowEncoder:
    """Turns the questions of one picture into token ids; remembers what it has encoded, for questions repeat."""

    tokenizer: PreTrainedTokenizerFast
    _known: dict[str, list[int]] = field(default_factory=dict)

    def encode(self, questions: tuple[Question, ...]) -> tuple[list[int], list[bool]]:
        """Ids of at most `ROW_TOKENS` tokens and, of equal length, whether each is an answer's (its `</s>` included).

        Questions that no longer fit are left out.
        """
        ids, is_target = [self.tokenizer.bos_token_id], [False]
        for question in questions:
            prompt = self._tokens(prompt_text(question.text, is_first=len(ids) == 1))
            answer = [*self._tokens(f" {question.answer}"), self.tokenizer.eos_token_id]
            if len(ids) + len(prompt) + len(answer) > ROW_TOKENS:
                continue
            ids += prompt + answer
            is_target += [False] * len(prompt) + [True] * len(answer)
        return ids, is_target

    def _tokens(self, text: str) -> list[int]:
        if text not in self._known:
            self._known[text] = self.tokenizer.encode(text, add_special_tokens=False)
        return self._known[text]
