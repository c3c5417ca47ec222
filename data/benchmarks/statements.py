"""Statements that are true of pictures or not: NLVR, where six pictures show one scene, and NLVR2, where two are one."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import PurePosixPath
from typing import Any

import PIL.Image

from vlm_distill_cache.common.errors import SampleError
from vlm_distill_cache.data.benchmarks.documents import Document
from vlm_distill_cache.data.benchmarks.items import Benchmark, YesNoItem
from vlm_distill_cache.data.benchmarks.layouts import Layout, Unread
from vlm_distill_cache.data.benchmarks.pictures import Pictures
from vlm_distill_cache.data.benchmarks.question_rows import (
    TRUE_FALSE,
    YES_OR_NO,
    Gathered,
    Row,
    edition,
    file_named,
    id_of,
    most,
    plain_path,
    probe,
    right_of,
    says_yes_or_no,
    text_of,
)
from vlm_distill_cache.data.sample import ImageSource
from vlm_distill_cache.data.sources.pictures import says_none

_EXAMPLE = re.compile(r"\d+-\d+")  # NLVR: the sentence's number and the scene's
_PAIR = re.compile(r"[A-Za-z]\w*-\d+-\d+-\d+")  # NLVR2: split, set of pictures, pair, sentence
_SPLITS = ("train", "dev", "test", "hidden")
_ORDERS = 6  # pictures of one scene, its boxes in each order
_SENTENCES = ("sentence", "sent", "statement")
_SIDES = (("left_image", "right_image"), ("image_left", "image_right"), ("img0", "img1"), ("image0", "image1"))
_GAP = 0.02  # of the width of two pictures beside one another


@dataclass(frozen=True)
class SideBySide:
    """Two pictures joined to one, the first on the left, at the same height, with a white gap between them."""

    left: ImageSource
    right: ImageSource

    @property
    def name(self) -> str:
        """What errors call it."""
        return f"{self.left.name} and {self.right.name}"

    def load(self) -> PIL.Image.Image:
        """Decode both and join them to RGB; `SampleError` if one of them cannot be read."""
        images = [self.left.load(), self.right.load()]
        height = max(image.height for image in images)
        widths = [max(1, round(image.width * height / image.height)) for image in images]
        gap = max(1, round(sum(widths) * _GAP))
        joined = PIL.Image.new("RGB", (sum(widths) + gap, height), "white")
        for image, width, at in zip(images, widths, (0, widths[0] + gap), strict=True):
            joined.paste(image.resize((width, height), PIL.Image.Resampling.BICUBIC), (at, 0))
        return joined


def _identifiers(document: Document, form: re.Pattern[str]) -> bool:
    rows = probe(document)
    return most(rows, lambda row: form.fullmatch(str(row.get("identifier"))) is not None)


def _is_nlvr(document: Document) -> bool:
    return (
        document.has("identifier", "sentence", "label")
        and _identifiers(document, _EXAMPLE)
        and says_yes_or_no(probe(document), "label")
    )


def _read_nlvr(documents: Sequence[Document], pictures: Pictures) -> list[Benchmark | Unread]:
    found: list[Benchmark | Unread] = []
    for document in documents:
        gathered = Gathered()
        splits = _splits_of(document, pictures)
        if len(splits) > 1:
            shown = " and ".join(f"'{split}-'".replace("'-'", "no split") for split in splits)
            why = f"the pictures of its examples are there with {shown} before their numbers: call it after its split (dev.json)"
            found.append(Unread(document, why))
            continue
        split = splits[0] if splits else ""
        for _, row, where in gathered.rows(document):
            for order in range(_ORDERS):
                own = f"{split or 'nlvr'}-{row.get('identifier')}-{order}"
                gathered.take(own, where, partial(_nlvr_item, document, row, own, pictures))
        name = f"nlvr-{split or edition(plain_path(document), 'nlvr')}"
        notes = ["six pictures of each example are asked about, as published"]
        found.append(gathered.benchmark(name, NLVR, "nlvr", [document], instruction=YES_OR_NO, notes=notes))
    return found


def _splits_of(document: Document, pictures: Pictures) -> list[str]:
    """The split by which a document's pictures are called: the one that it is named after, else all that are there."""
    kinds = (*_SPLITS, "")  # or none of them stands before the identifier
    there = {split for row in probe(document) for split in kinds if _has_picture(split, row, document, pictures)}
    for part in reversed(PurePosixPath(document.shown.lower()).parts):
        named = set(re.split(r"[^a-z]+", part)) & set(_SPLITS)
        if len(named) == 1 and (not there or named <= there):
            return [named.pop()]
    return sorted(there)


def _has_picture(split: str, row: Row, document: Document, pictures: Pictures) -> bool:
    try:
        pictures.find(f"{split}-{row.get('identifier')}-0".lstrip("-"), near=document.path.parent)
    except SampleError:
        return False
    return True


def _nlvr_item(document: Document, row: Row, own: str, pictures: Pictures, item_id: str) -> YesNoItem:
    example = str(row.get("identifier"))
    if not _EXAMPLE.fullmatch(example):
        raise SampleError(f"'identifier' must be two numbers, as 72-0, got {example[:60]!r}")
    if item_id != own:
        raise SampleError(f"{own} is there already")
    return YesNoItem(
        item_id=item_id,
        group=example.partition("-")[0],
        image=pictures.find(own.removeprefix("nlvr-"), near=document.path.parent),
        question=_asked("image", text_of(row, "sentence")),
        right=right_of(row, "label"),
        extra={"question_id": item_id, "prediction_id": f"{own}.png"},
    )


def _asked(of_what: str, sentence: str) -> str:
    return f"Is the following statement about the {of_what} true? {sentence}"


def _keys_of(row: Row) -> tuple[str, str]:
    """Under which keys a row of two pictures has its sentence and its label."""
    sentence = next((key for key in _SENTENCES if key in row), "question")
    return sentence, "label" if "label" in row else "answer"


def _is_nlvr2(document: Document) -> bool:
    rows = probe(document)
    stated = not document.columns.isdisjoint(_SENTENCES)
    label = (
        "label" if document.has("label") else "answer"
    )  # answers that are yes or no are to questions of another kind
    if not (says_yes_or_no(rows, label) if stated else says_yes_or_no(rows, label, TRUE_FALSE)):
        return False
    if stated:
        pairs = most(rows, lambda row: isinstance(row.get("images"), list | tuple) and len(row["images"]) == 2)
        return pairs or any(document.has(*sides) for sides in _SIDES) or _identifiers(document, _PAIR)
    return document.has("question") and any(document.has(*sides) for sides in _SIDES[:2])


def _read_nlvr2(documents: Sequence[Document], pictures: Pictures) -> list[Benchmark]:
    found = []
    for document in documents:
        gathered = Gathered()
        name = f"nlvr2-{edition(plain_path(document), 'nlvr2')}".strip("-")
        for index, row, where in gathered.rows(document):
            own = str(_identifier(row) or id_of(row, index + 1))
            gathered.take(own, where, partial(_nlvr2_item, document, index, row, own, pictures))
        notes = ["the two pictures of a statement are shown as one, side by side, with a white gap"]
        if gathered.items and not any(item.group for item in gathered.items):
            notes.append(
                "no consistency: the rows have no identifiers (split-set-pair-sentence) that tell which share a sentence"
            )
        found.append(gathered.benchmark(name, NLVR2, "nlvr", [document], instruction=YES_OR_NO, notes=notes))
    return found


def _identifier(row: Row) -> str | None:
    """The published identifier, wherever it stands: ``dev-850-0-1``."""
    for key in ("identifier", "question_id", "uid", "id"):
        if _PAIR.fullmatch(str(row.get(key))):
            return str(row[key])
    return None


def _nlvr2_item(document: Document, index: int, row: Row, own: str, pictures: Pictures, item_id: str) -> YesNoItem:
    identifier = _identifier(row)
    sentence, label = _keys_of(row)
    group = ""
    if identifier:
        if item_id != own:
            raise SampleError(f"{own} is there already")
        split, pictured, _, number = identifier.rsplit("-", 3)
        group = f"{split}-{pictured}-{number}"
    left, right = _two_of(document, index, row, identifier, pictures)
    return YesNoItem(
        item_id=item_id,
        group=group,
        image=SideBySide(left, right),
        question=_asked("left and the right image", text_of(row, sentence)),
        right=right_of(row, label),
        extra={"question_id": id_of(row, item_id), "prediction_id": identifier or item_id},
    )


def _two_of(
    document: Document, index: int, row: Row, identifier: str | None, pictures: Pictures
) -> tuple[ImageSource, ImageSource]:
    """The left and the right picture: in the row, named there, or called by the identifier without its sentence."""
    for sides in _SIDES:
        if not any(says_none(row.get(side)) for side in sides):
            left, right = (_one(document, index, row.get(side), side, None, pictures) for side in sides)
            return left, right
    listed = row.get("images")
    if isinstance(listed, list | tuple) and len(listed) == 2:
        left, right = (_one(document, index, listed[place], "images", place, pictures) for place in (0, 1))
        return left, right
    if identifier is None:
        raise SampleError(
            "it must have two pictures (left_image and right_image, or images) or an identifier that names them"
        )
    stem = identifier.rpartition("-")[0]
    left, right = (pictures.find(f"{stem}-img{side}", near=document.path.parent) for side in (0, 1))
    return left, right


def _one(document: Document, index: int, value: Any, column: str, place: int | None, pictures: Pictures) -> ImageSource:
    name = file_named(document, value)
    return document.picture(index, column, place) if name is None else pictures.find(name, near=document.path.parent)


NLVR = Layout(
    name="nlvr",
    title="NLVR",
    looks_for="rows of identifier (two numbers, as 72-0), sentence and label (true or false); pictures SPLIT-72-0-0.png to -5",
    source="https://github.com/lil-lab/nlvr, folder nlvr",
    licence="CC BY 4.0",
    scores="accuracy, consistency (sentences with which all pictures are answered rightly)",
    recognises=_is_nlvr,
    read=_read_nlvr,
)
NLVR2 = Layout(
    name="nlvr2",
    title="NLVR2",
    looks_for="rows of sentence and label (true or false) with identifier (as dev-850-0-1; pictures dev-850-0-img0.png and "
    "-img1.png), left_image and right_image, or images (two); or of question, answer, left_image and right_image",
    source="https://github.com/lil-lab/nlvr, folder nlvr2; https://huggingface.co/datasets/lmms-lab/NLVR2, https://huggingface.co/datasets/HuggingFaceM4/NLVR2",
    licence="CC BY 4.0; pictures by their owners, given for research",
    scores="accuracy, consistency (sentences with which all pairs are answered rightly)",
    recognises=_is_nlvr2,
    read=_read_nlvr2,
)
LAYOUTS = (NLVR, NLVR2)
