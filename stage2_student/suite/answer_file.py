"""Answers as outside scorers read them: LLaVA's answers file for any benchmark, and what evaluation servers take.

No score is needed for it, so that benchmarks whose answers are kept secret can be answered, too.
"""

import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import xxhash

from vlm_distill_cache.data.benchmarks.items import Benchmark, Item
from vlm_distill_cache.stage2_student.suite.metrics.yes_no import parse_yes_no
from vlm_distill_cache.stage2_student.suite.requests import Generate, Request, Result

_NUMBER = re.compile(r"0|[1-9]\d{0,17}")
_VIZWIZ = re.compile(r"VizWiz_\w+\.\w{3,4}", re.IGNORECASE)
Answered = Sequence[tuple[Item, str]]  # each question with its answer


def answer_lines(
    benchmark: Benchmark,
    requests: Sequence[Sequence[Request]],
    results: Sequence[Sequence[Result]],
    model_id: str,
) -> Iterator[str]:
    """A line of JSON for each item with a generated answer, without its line end, in the order of the items.

    Of an item that was asked in several ways (options rotated) the first is the question as published; scorers keep one
    answer an id, and would take a rotation's letter for it.

    Args:
        requests: Of each item, as they were asked; those that are no `Generate` are passed over.
        results: Of each of them.
        model_id: What scorers call the model.

    Source:
        LLaVA's ``model_vqa.py``: ``question_id``, ``prompt``, ``text``, ``answer_id``, ``model_id``, ``metadata``. Its
        answer ids are random; these are hashes, so that the same answers are the same file.
    """
    for item, asked, given in zip(benchmark.items, requests, results, strict=True):
        found = next(((r, text) for r, text in zip(asked, given, strict=True) if isinstance(r, Generate)), None)
        if found is not None:
            request, text = found
            line = {
                "question_id": _published_id(item, benchmark.layout),
                "prompt": _prompt(request, benchmark.layout),
                "text": text,
                "answer_id": xxhash.xxh3_128_hexdigest(
                    json.dumps([model_id, benchmark.name, item.item_id, text]).encode()
                ),
                "model_id": model_id,
                "metadata": {},
            }
            yield json.dumps(line, ensure_ascii=False)


def _prompt(request: Generate, layout: str) -> str:
    """What was asked; LLaVA's scorer of ScienceQA tells questions with a picture by the mark that its model's script writes."""
    marked = layout.startswith("scienceqa") and request.image is not None
    return f"<image>\n{request.question}" if marked else request.question


def _published_id(item: Item, layout: str = "") -> Any:
    """The id of a question as its file writes it, a number where that has one."""
    told = item.extra.get("question_id", item.item_id)
    # A TSV has no types: who reads MMBench's with pandas has numbers, and compares with them.
    return int(told) if layout == "mmbench" and _NUMBER.fullmatch(str(told)) else told


def submissions(
    benchmark: Benchmark, requests: Sequence[Sequence[Request]], results: Sequence[Sequence[Result]]
) -> Mapping[str, str]:
    """Files that the benchmark's own evaluation takes, by name: their text. Empty where `answer_lines` are all there is.

    Of an item that was asked in several ways the first generated answer counts.
    """
    write = _FORMS.get(benchmark.layout)
    answered = []
    for item, asked, given in zip(benchmark.items, requests, results, strict=True):
        texts = [text for request, text in zip(asked, given, strict=True) if isinstance(request, Generate)]
        if texts:
            answered.append((item, str(texts[0])))
    return write(answered) if write and answered else {}


def _listed(
    id_key: str, answer_key: str, id_of: Callable[[Item], Any] = lambda item: item.extra.get("question_id")
) -> Callable[..., dict[str, str]]:
    """A JSON list of objects of an id and an answer; none where a table does not tell the ids that its server knows."""

    def write(answered: Answered) -> dict[str, str]:
        if any(id_of(item) is None for item, _ in answered):
            return {}
        rows = [{id_key: id_of(item), answer_key: text} for item, text in answered]
        return {"submission.json": json.dumps(rows, ensure_ascii=False) + "\n"}

    return write


def _picture_name(item: Item) -> Any:
    name = str(item.extra.get("image", item.item_id))
    return name if _VIZWIZ.fullmatch(name) else None


def _lines(answered: Answered) -> dict[str, str]:
    rows = [{"question_id": _published_id(item), "prediction": text} for item, text in answered]
    return {"submission.jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)}


def _hallusion(answered: Answered) -> dict[str, str]:
    rows = [{**item.extra, "model_prediction": text} for item, text in answered]
    return {"HallusionBench_result.json": json.dumps(rows, ensure_ascii=False) + "\n"}


def _pope(answered: Answered) -> dict[str, str]:
    files: dict[str, str] = {}
    for item, text in answered:
        for split in item.kind.split(","):
            row = {"question": str(item.extra.get("question", "")), "answer": text}
            name = f"answers_{split or 'all'}.json"
            files[name] = files.get(name, "") + json.dumps(row, ensure_ascii=False) + "\n"
    return files


def _mme(answered: Answered) -> dict[str, str]:
    """A text a task, two lines a picture: its name, the question, what is right, what was answered."""
    files: dict[str, str] = {}
    for item, text in sorted(answered, key=lambda given: given[0].group):
        cells = (item.extra["image"], item.extra["question"], item.extra["answer"], text)
        files[f"{item.kind}.txt"] = (
            files.get(f"{item.kind}.txt", "") + "\t".join(" ".join(str(cell).split()) for cell in cells) + "\n"
        )
    return files


def _nlvr(answered: Answered) -> dict[str, str]:
    """A CSV line of the example, or of its picture, and True or False; what is neither counts as wrong there, too."""
    out = io.StringIO()
    for item, text in answered:
        said = {True: "True", False: "False", None: "neither"}[parse_yes_no(text)]
        csv.writer(out, lineterminator="\n").writerow([item.extra["prediction_id"], said])
    return {"predictions.csv": out.getvalue()}


_FORMS: Mapping[str, Callable[[Answered], dict[str, str]]] = {
    "vqav2": _listed("question_id", "answer"),
    "textvqa": _listed("question_id", "answer"),
    "vizwiz": _listed("image", "answer", _picture_name),
    "gqa": _listed("questionId", "prediction", lambda item: item.item_id),
    "docvqa": _listed("questionId", "answer"),
    "seedbench": _lines,
    "hallusionbench": _hallusion,
    "pope": _pope,
    "mme": _mme,
    "nlvr": _nlvr,
    "nlvr2": _nlvr,
}
