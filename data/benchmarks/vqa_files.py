"""The files of the VQA challenge, which OK-VQA has, too: questions in one JSON, ten answers each in another, or a table."""

import os
import re
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import PurePosixPath
from typing import Any

from vlm_distill_cache.common.errors import SampleError
from vlm_distill_cache.data.benchmarks.documents import Document, readable
from vlm_distill_cache.data.benchmarks.items import Benchmark
from vlm_distill_cache.data.benchmarks.layouts import Layout, Unread
from vlm_distill_cache.data.benchmarks.open_questions import (
    IN_A_WORD,
    TEN,
    Entries,
    Found,
    entries_of,
    is_table_of_texts,
    named,
    number_of,
    picture_in,
    row_id,
    split_of,
    top_text,
)
from vlm_distill_cache.data.benchmarks.pictures import Pictures
from vlm_distill_cache.data.sample import ImageSource

_QUESTION = ("image_id", "question", "question_id")
_ANNOTATION = ("image_id", "question_id", "answers")
_NO_ANNOTATIONS = (
    "no annotations found: looked for a JSON whose list under annotations has answers for the same question_id and "
    "image_id"
)
# OK-VQA's kinds of knowledge, for tables that have their keys alone.
_KNOWLEDGE = {
    "one": "Vehicles and Transportation",
    "two": "Brands, Companies and Products",
    "three": "Objects, Material and Clothing",
    "four": "Sports and Recreation",
    "five": "Cooking and Food",
    "six": "Geography, History, Language and Culture",
    "seven": "People and Everyday life",
    "eight": "Plants and Animals",
    "nine": "Science and Technology",
    "ten": "Weather and Climate",
    "other": "Other",
}

_OF_EIGHTEEN = (
    "its questions are VQA v1's multiple choice among 18 answers, which is not scored; give the questions for open answers "
    "(OpenEnded_..._questions.json), which have the same annotations"
)

Annotations = Mapping[tuple[str, str], Mapping[str, Any]]  # by question and picture


def _listed(document: Document, under: str, keys: Sequence[str]) -> Sequence[Mapping[str, Any]]:
    found = document.top.get(under) if isinstance(document.top, dict) else None
    entries = [entry for entry in found if isinstance(entry, dict)] if isinstance(found, list) else []
    return entries if any(set(keys) <= entry.keys() for entry in entries[:32]) else ()


def _questions(document: Document) -> Sequence[Mapping[str, Any]]:
    return _listed(document, "questions", _QUESTION)


def _annotations(document: Document) -> Sequence[Mapping[str, Any]]:
    return _listed(document, "annotations", _ANNOTATION)


def is_multiple_choice(document: Document) -> bool:
    """Whether a file has VQA v1's questions with 18 answers to choose from, whose right ones are in another file."""
    asked = _questions(document)[:32]
    return any("multiple_choices" in each and not any("answer" in key for key in each) for each in asked)


def _is_vqa(document: Document) -> bool:
    entries = entries_of(document)
    types = entries.has("answers", "question_type", "answer_type") or entries.has(
        "multiple_choice_answer", "question_type"
    )
    rows = entries.has("question", "question_id") and types
    return bool(_questions(document) or _annotations(document) or rows)


def _read_vqa(documents: Sequence[Document], pictures: Pictures) -> list[Benchmark | Unread]:
    answered = [document for document in documents if _annotations(document)]
    used: set[int] = set()
    found: list[Benchmark | Unread] = []
    for document in documents:
        if _questions(document):
            fitting, problem = _fitting(document, answered)
            used |= {id(each) for each in fitting}
            problem = _OF_EIGHTEEN if is_multiple_choice(document) else problem
            found.append(Unread(document, problem) if problem else _of_files(document, fitting, pictures))
        elif not _annotations(document):
            found.append(_of_rows(document, pictures))
    why = (
        "answers to questions that are in none of the folder's files; looked for a JSON whose questions have the same "
        "question_id and image_id"
    )
    return [*found, *(Unread(document, why) for document in answered if id(document) not in used)]


def _key(entry: Mapping[str, Any]) -> tuple[str, str]:
    """What an answer is found by; a number may stand as a text, with zeros in front, in one of the files."""
    numbers = {key: number_of(entry.get(key)) for key in ("question_id", "image_id")}
    question, picture = (str(entry.get(key) if number is None else number) for key, number in numbers.items())
    return question, picture


def _fitting(document: Document, answered: Sequence[Document]) -> tuple[list[Document], str]:
    """The files that answer questions of this one's split; of several that contradict each other those that lie closest.

    Returns:
        The files; and why there is no telling which are meant.
    """
    asked = {_key(question) for question in _questions(document)}
    alike = [each for each in answered if len({_subtype(document), _subtype(each)} - {""}) < 2]
    fitting = [each for each in alike if any(_key(entry) in asked for entry in _annotations(each))]
    shared = [len(os.path.commonpath([document.path.parent, each.path.parent])) for each in fitting]
    nearest = [each for each, length in zip(fitting, shared, strict=True) if length == max(shared)]
    for chosen in (fitting, nearest):
        if not (clash := _contradiction(chosen)):
            return chosen, ""
    return [], f"{clash} answer the same question differently; keep each benchmark in a folder of its own"


def _contradiction(documents: Sequence[Document]) -> str:
    seen: dict[tuple[str, str], tuple[Any, Document]] = {}
    for document in documents:
        for entry in _annotations(document):
            answers, other = seen.setdefault(_key(entry), (entry.get("answers"), document))
            if answers != entry.get("answers"):
                return f"{other.shown} and {document.shown}"
    return ""


def _subtype(document: Document) -> str:
    return top_text(document, "data_subtype")


def _of_files(document: Document, answered: Sequence[Document], pictures: Pictures) -> Benchmark:
    annotations = {_key(entry): entry for each in answered for entry in _annotations(each)}
    split = split_of(document, _subtype(document), *map(_subtype, answered))
    told = {key: value for each in answered for key, value in _knowledge_of(each).items()}
    is_ok = bool(told) or any("raw_answer" in str(_annotations(each)[:3])[:4000] for each in answered)
    is_ok = is_ok or _says_ok(document)
    entries = Entries(document, _questions(document), frozenset(_questions(document)[0]))
    found = Found(pictures, TEN)
    for index, question in enumerate(entries.rows):
        annotation = annotations.get(_key(question), {})
        _add(found, entries, index, annotation, split, {**_KNOWLEDGE, **told} if is_ok else {})
    version = top_text(document, "info", "version")
    is_first = not is_ok and version.startswith("1")
    abstract = "abstract" in _pictured(document, split)
    name = "okvqa" if is_ok else "vqav1" if is_first else "vqav2"
    title = "OK-VQA" if is_ok else "VQA v1" if is_first else "VQAv2"
    return _benchmark(
        found,
        [document, *answered],
        name=named(f"{name}-abstract" if abstract else name, split),
        title=title,
        notes=[] if answered or split.startswith("test") else [_NO_ANNOTATIONS],
    )


def _says_ok(document: Document) -> bool:
    """Whether its description says OK-VQA, or else the nearest part of its path that names one of the two."""
    for said in (top_text(document, "info", "description"), *reversed(PurePosixPath(document.shown).parts)):
        text = re.sub(r"[^a-z0-9]", "", said.lower())
        is_ok, is_vqa = "okvqa" in text, "vqa" in text.replace("okvqa", "")
        if is_ok != is_vqa:
            return is_ok
    return False


def _knowledge_of(document: Document) -> Mapping[str, str]:
    """OK-VQA's annotations name its kinds of questions."""
    found = document.top.get("question_types") if isinstance(document.top, dict) else None
    return {str(key): str(value) for key, value in found.items()} if isinstance(found, dict) else {}


def _of_rows(document: Document, pictures: Pictures) -> Benchmark:
    entries, found = entries_of(document), Found(pictures, TEN)
    split = split_of(document)
    kinds = {str(row.get("question_type")) for row in islice(readable(entries.rows), 200)}
    is_ok = not entries.has("multiple_choice_answer") and kinds <= _KNOWLEDGE.keys()
    for index, row in entries.each(found.left_out):
        _add(found, entries, index, row, split, _KNOWLEDGE if is_ok else {})
    return _benchmark(
        found, [document], name=named("okvqa" if is_ok else "vqav2", split), title="OK-VQA" if is_ok else "VQAv2"
    )


def _add(
    found: Found,
    entries: Entries,
    index: int,
    annotation: Mapping[str, Any],
    split: str,
    names: Mapping[str, str],
) -> None:
    row = entries.rows[index]
    kind = str(annotation.get("question_type") or "")
    found.add(
        row_id(row, "question_id", default=index),
        row.get("question"),
        annotation.get("answers"),
        lambda: _picture(entries, index, found.pictures, split),
        listed=is_table_of_texts(entries.document),
        kind=str(annotation.get("answer_type") or "") if not names else "",
        extra={"subsets": [names.get(kind, kind)]} if kind else {},
    )


def _picture(entries: Entries, index: int, pictures: Pictures, split: str) -> ImageSource:
    row = entries.rows[index]
    near = entries.document.path.parent
    number = number_of(row.get("image_id", row.get("id_image")))
    if row.get("image") is not None or number is None:
        return picture_in(
            entries, index, pictures, named=[str(row.get("image_id") or "")], hints=[split] if split else []
        )
    folder = split.replace("testdev", "test")
    kind = _pictured(entries.document, split)
    if kind and kind != "mscoco":
        return pictures.find(f"{kind}_{folder}_{number:012d}", near=near, hints=[folder])
    try:
        return pictures.numbered(number, near=near, hints=[folder] if folder else [])
    except SampleError as error:
        raise SampleError(f"question {row.get('question_id')}: {error}") from error


def _pictured(document: Document, split: str) -> str:
    """What names of its pictures begin with; of abstract scenes also where the file does not say it as theirs do."""
    said = top_text(document, "data_type").lower()
    texts = (said, top_text(document, "info", "description").lower(), document.shown.lower())
    if any("abstract" in text for text in texts if said != "mscoco") or split in ("train2015", "val2015"):
        return said if said.startswith("abstract_v") else "abstract_v002"
    return said


def _benchmark(
    found: Found, documents: Sequence[Document], *, name: str, title: str, notes: Sequence[str] = ()
) -> Benchmark:
    return found.benchmark(
        name=name,
        layout="vqav2",
        title=title,
        metric="vqa_accuracy",
        instruction=IN_A_WORD,
        documents=documents,
        notes=notes,
    )


VQA = Layout(
    name="vqav2",
    title="VQAv2, OK-VQA",
    looks_for="a JSON of questions (image_id, question, question_id) and one of annotations (question_id, image_id, answers) for "
    "them; or rows of a table with question, question_id, answers, question_type, answer_type",
    source="https://visualqa.org/download.html, https://okvqa.allenai.org/download.html, pictures of https://cocodataset.org "
    "(train2014, val2014, test2015); hub: lmms-lab/VQAv2, lmms-lab/OK-VQA",
    licence="CC BY 4.0; pictures of COCO: those of Flickr",
    scores="VQA accuracy over ten answers, by answer type and question type; as vqaEval.py",
    recognises=_is_vqa,
    read=_read_vqa,
)
