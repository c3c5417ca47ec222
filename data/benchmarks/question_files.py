"""LLaVA's question files: what a model is asked, without answers, for scorers of their own (`suite.answer_file`)."""

import re
from collections.abc import Sequence
from functools import partial
from pathlib import PurePosixPath

from vlm_distill_cache.data.benchmarks.documents import Document
from vlm_distill_cache.data.benchmarks.items import Benchmark, OpenItem
from vlm_distill_cache.data.benchmarks.layouts import Layout, Unread
from vlm_distill_cache.data.benchmarks.pictures import Pictures
from vlm_distill_cache.data.benchmarks.question_rows import (
    Gathered,
    Row,
    file_named,
    id_of,
    picture_of,
    plain_path,
    probe,
    text_of,
)
from vlm_distill_cache.data.sources.pictures import says_none

_PICTURE = re.compile(r"\s*<image>\s*")
_JUDGED = ("gpt_answer", "gpt4_ans")  # a judge's reference beside a question: LLaVA-Bench of the hub and of VLMEvalKit
_OTHERS = ("answer", "answers", "label", "options", "choices", "conversations", "sentence")


def _is_questions(document: Document) -> bool:
    if document.has("question", "image", "caption") and not document.columns.isdisjoint(_JUDGED):
        return document.columns.isdisjoint(_OTHERS)
    return document.has("question_id", "text") and document.columns.isdisjoint(_OTHERS)


def _is_answers(document: Document) -> bool:
    return document.has("question_id", "text") and not document.columns.isdisjoint(("answer_id", "model_id"))


def _read(documents: Sequence[Document], pictures: Pictures) -> list[Benchmark | Unread]:
    found: list[Benchmark | Unread] = []
    for document in documents:
        if _is_answers(document):
            found.append(
                Unread(document, "it holds a model's answers, not questions; give the question file that it answers")
            )
            continue
        if not any("image" in row for row in probe(document)):
            why = "its rows have no 'image': questions without pictures have \"image\": null, and answers are no questions"
            found.append(Unread(document, why))
            continue
        gathered = Gathered()
        for index, row, where in gathered.rows(document):
            make = partial(_item, document, index, row, pictures)
            gathered.take(str(id_of(row, index + 1)), where, make)
        path = PurePosixPath(plain_path(document))
        stem, folder = (re.sub(r"[^a-z0-9.]+", "-", part).strip("-.") for part in (path.name, path.parent.name))
        name = stem if stem.startswith("llava") else "-".join(filter(None, ("llava", folder, stem)))
        notes = [
            "no answers are published with these questions: nothing is scored, the answers file is for outside scorers"
        ]
        found.append(gathered.benchmark(name, QUESTIONS, "answers-only", [document], notes=notes))
    return found


def _item(document: Document, index: int, row: Row, pictures: Pictures, item_id: str) -> OpenItem:
    without = says_none(row.get("image"))
    name = file_named(document, row.get("image"))  # a table's base64 is none
    return OpenItem(
        item_id=item_id,
        kind=str(row.get("category") or ""),
        image=None if without else picture_of(document, index, row, pictures, ("image",)),
        question=_PICTURE.sub("\n", text_of(row, "text", "question")).strip(),
        extra={"question_id": id_of(row, item_id)} | ({"image": name} if name else {}),
    )


QUESTIONS = Layout(
    name="llava-questions",
    title="LLaVA's question file",
    looks_for="rows of question_id, image and text, without answers or labels; or of question, image, caption and gpt_answer",
    source="https://github.com/haotian-liu/LLaVA, its page on evaluation (eval.zip); "
    "https://huggingface.co/datasets/liuhaotian/llava-bench-in-the-wild",
    licence="that of the benchmark that it asks",
    scores="nothing: answers are written for outside scorers",
    recognises=_is_questions,
    read=_read,
)
LAYOUTS = (QUESTIONS,)
