"""Responses as servers write them, from the dense logits of a real tiny model."""

import json
import math
from pathlib import Path
from typing import Any

import torch

from vlm_distill_cache.data.registry import open_dataset
from vlm_distill_cache.data.text.collate import collate
from vlm_distill_cache.data.text.encoding import EncodedSample
from vlm_distill_cache.stage1_teacher.planning.plan import build_encoder
from vlm_distill_cache.stage1_teacher.teacher.teacher import Teacher


class FakeServer:
    """Scores samples of a data set with a tiny model, every row of them."""

    def __init__(self, teacher: Path, data: Path, *, template: str = "auto") -> None:
        self.teacher = Teacher(teacher, dtype="float32", device="cpu")
        self.tokenizer = self.teacher.tokenizer
        encoder = build_encoder(self.teacher, template=template, max_length=512)
        dataset = open_dataset(str(data))
        self.samples = [encoder(dataset[index]) for index in range(len(dataset))]

    def log_probs(self, sample: EncodedSample) -> torch.Tensor:
        """Log-probabilities float64 ``[T, V]``; row p is about token p + 1."""
        batch = collate([sample], self.teacher.pad_token_id)
        inputs = self.teacher.family.model_inputs(self.teacher.config, batch, dtype=torch.float32)
        with torch.inference_mode():
            return self.teacher.model(**inputs, use_cache=False).logits[0].log_softmax(-1).double()

    def entries(self, sample: EncodedSample, k: int) -> list[list[tuple[int, float]] | None]:
        """Of each token: itself, then the K likeliest in its place."""
        log_probs, ids = self.log_probs(sample), sample.input_ids.tolist()
        found: list[list[tuple[int, float]] | None] = [None]
        for token, row in zip(ids[1:], log_probs, strict=False):
            values, places = row.topk(k)
            found.append([(token, float(row[token])), *zip(places.tolist(), values.tolist(), strict=True)])
        return found

    def vllm(self, sample: EncodedSample, k: int = 8) -> dict[str, Any]:
        """A completion's body with ``prompt_logprobs``: one generated token stands behind the prompt."""
        positions = [
            None
            if entry is None
            else {str(token): {"logprob": clamp(value), "rank": 1, "decoded_token": "x"} for token, value in entry}
            for entry in self.entries(sample, k)
        ]
        choice = {"index": 0, "text": "!", "prompt_logprobs": positions, "prompt_token_ids": sample.input_ids.tolist()}
        return {"id": "cmpl-1", "model": "tiny", "choices": [choice]}

    def sglang(self, sample: EncodedSample, k: int = 8) -> dict[str, Any]:
        entries, ids = self.entries(sample, k), sample.input_ids.tolist()
        own = [[None if entry is None else entry[0][1], token, None] for entry, token in zip(entries, ids, strict=True)]
        tops = [None if entry is None else [[value, token, None] for token, value in entry[1:]] for entry in entries]
        return {
            "text": "!",
            "meta_info": {"input_token_logprobs": own, "input_top_logprobs": tops, "prompt_tokens": len(ids)},
        }

    def openai(self, sample: EncodedSample, k: int = 8, *, numbered: bool = True) -> dict[str, Any]:
        """A chat's body: the answer's tokens alone, by text or as vLLM numbers them."""
        entries = self.entries(sample, k)

        def written(token: int, value: float) -> dict[str, Any]:
            text = f"token_id:{token}" if numbered else self.tokenizer.decode([token])
            return {"token": text, "logprob": clamp(value), "bytes": list(text.encode())}

        content = []
        for row in sample.supervised_rows:
            entry = entries[row + 1]
            content.append({**written(*entry[0]), "top_logprobs": [written(*item) for item in entry[1:]]})
        return {"model": "tiny", "choices": [{"message": {"content": "x"}, "logprobs": {"content": content}}]}


def clamp(value: float) -> float:
    return max(value, -9999.0) if not math.isnan(value) else value


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path
