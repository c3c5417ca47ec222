"""Captions that differ by a relation, an attribute, or the order of words: ARO and What's Up."""

import math
import random
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import takewhile
from typing import Any

from vlm_distill_cache.common.errors import SampleError
from vlm_distill_cache.data.benchmarks.caption_rows import (
    Crop,
    Row,
    benchmark,
    benchmarks_of,
    gather,
    kind_in_path,
    listed,
    names_in,
    names_picture,
    path_parts,
    picture_of,
    probe,
    sentence,
    sentences,
)
from vlm_distill_cache.data.benchmarks.documents import Document
from vlm_distill_cache.data.benchmarks.items import Benchmark, CaptionItem, missing_kinds
from vlm_distill_cache.data.benchmarks.layouts import Layout, Unread
from vlm_distill_cache.data.benchmarks.pictures import Pictures
from vlm_distill_cache.data.sample import ImageSource
from vlm_distill_cache.data.sources.pictures import says_none

_BOX = ("bbox_x", "bbox_y", "bbox_w", "bbox_h")
_PLACES = frozenset("on under above below behind front left right top bottom".split())  # noqa: SIM905
_CONTROLLED = frozenset("on under front behind left right".split())  # noqa: SIM905
_AROUND = frozenset("a an the to of in".split())  # noqa: SIM905  what stands beside those words
_LONGEST_ORDER = 30  # words
_COUNTED = 25  # items of a pair of attributes
_CAPTIONS = 5  # of each picture of COCO and Flickr30k
_ORDERS = ("words shuffled within groups of three", "groups of three words shuffled")


def _sort_of_options(document: Document) -> str:
    """What ``caption_options`` are: ``places`` (What's Up), ``order`` (one sentence in several orders), else nothing."""
    sorts = []
    for row in probe(document):
        try:
            options = sentences(row, "caption_options")
        except SampleError:
            continue
        if len(options) > 1:
            sorts.append(_sort_of(options))
    return max(set(sorts), key=sorts.count) if sorts else ""


def _sort_of(options: Sequence[str]) -> str:
    if len(set(map(_things, options))) == 1 and all(_place(text) for text in options):
        return "places"
    letters = {"".join(sorted(re.sub(r"\W", "", text.lower()))) for text in options}
    return "order" if len(letters) == 1 and len(options) > 2 else ""


def _words(text: str) -> list[str]:
    return re.findall(r"[\w'-]+", text.lower())


def _things(text: str) -> str:
    """What a caption of places says something about: its words without those of the place."""
    return " ".join(word for word in _words(text) if word not in _PLACES | _AROUND)


def _place(text: str) -> str:
    """The last word of a caption that says where something is."""
    return next((word for word in reversed(_words(text)) if word in _PLACES), "")


def _around_place(options: Sequence[str]) -> tuple[list[str], list[str], list[list[str]]]:
    """The words that all options begin with, those that they end with, and what each says in between: where something is."""
    words = [_words(text) for text in options]
    start = _shared(words)
    end = _shared([each[start:][::-1] for each in words])
    return words[0][:start], words[0][len(words[0]) - end :], [each[start : len(each) - end] for each in words]


def _shared(lists: Sequence[Sequence[str]]) -> int:
    """How many words from the first on are the same in all."""
    return sum(1 for _ in takewhile(lambda words: len(set(words)) == 1, zip(*lists, strict=False)))


def _controlled_places(options: Sequence[str]) -> list[str]:
    """Which of What's Up's six places each option says; a left shoe is a thing."""
    return [next((word for word in between if word in _CONTROLLED), "") for between in _around_place(options)[2]]


# --- ARO: relations and attributes ---


def _is_aro_pair(document: Document) -> bool:
    return document.has("true_caption", "false_caption") and names_picture(document)


def _aro_task(document: Document) -> str:
    """``relation``, ``attribution``, or nothing where neither columns nor names tell."""
    if "attributes" in document.columns:
        return "attribution"
    if "relation_name" in document.columns:
        return "relation"
    return kind_in_path(document, lambda name: next((task for task in ("attribution", "relation") if task in name), ""))


def _aro_kind(document: Document, row: Row) -> str:
    attributes = listed(row.get("attributes"))
    if isinstance(attributes, list | tuple) and len(attributes) == 2:
        return f"{attributes[0]}_{attributes[1]}"
    return str(row.get("relation_name") or "")


def _aro_item(pictures: Pictures, document: Document, index: int, row: Row) -> CaptionItem:
    image: ImageSource = picture_of(document, index, row, pictures)
    box = [row.get(key) for key in _BOX]
    if not all(says_none(value) for value in box):
        try:
            left, top, width, height = (float(str(value)) for value in box)
        except ValueError:
            left = top = width = height = math.nan
        if not (math.isfinite(left + top + width + height) and width > 0 and height > 0):
            raise SampleError(f"{', '.join(_BOX)} must be four numbers of pixels, the last two above 0, got {box}")
        image = Crop(image, (left, top, width, height))
    captions = (sentence(row, "true_caption"), sentence(row, "false_caption"))
    return CaptionItem(item_id="", images=(image,), captions=captions, fits=((True, False),))


def _read_aro_pairs(documents: Sequence[Document], pictures: Pictures) -> Iterator[Benchmark]:
    by_task: dict[str, list[Document]] = {}
    for document in documents:
        by_task.setdefault(_aro_task(document), []).append(document)
    for task, members in by_task.items():
        name = f"aro-{task or 'pairs'}"
        for named, group in benchmarks_of(name, members, lambda _: ""):
            found = gather(group, partial(_aro_item, pictures), _aro_kind)
            notes = []
            if any(not item.kind for item in found.items):
                told = "attributes" if task == "attribution" else "relation_name"
                notes.append(
                    f"rows without {told!r}, so that the score is the mean over items, not over relations or attributes as "
                    "published"
                )
            elif (
                task == "attribution" and max(Counter(item.kind for item in found.items).values(), default=0) < _COUNTED
            ):
                notes.append(
                    f"no pair of attributes has the {_COUNTED} items from which on it counts as published, so that the score is "
                    "the mean over items"
                )
            yield benchmark(
                named,
                layout="aro",
                title={"relation": "ARO: VG-Relation", "attribution": "ARO: VG-Attribution"}.get(task, "ARO"),
                metric="aro-attribution" if task == "attribution" else "aro-relation",
                found=found,
                documents=group,
                notes=notes,
            )


# --- ARO: the order of words ---


def _is_order(document: Document) -> bool:
    if document.has("correct_caption", "hard_text_1"):
        return names_picture(document)
    if _karpathy(document):
        return True
    return _is_retrieval_split(document) or (
        names_picture(document) and document.has("caption_options") and _sort_of_options(document) != "places"
    )


def _karpathy(document: Document) -> Sequence[Mapping[str, Any]]:
    """The pictures of ``dataset_coco.json``, each with its split and sentences; none in other files."""
    images = document.top.get("images") if isinstance(document.top, dict) else None
    if not isinstance(images, list) or not images:
        return ()
    known = all(isinstance(entry, dict) and {"split", "sentences", "filename"} <= set(entry) for entry in images)
    return images if known else ()


def _is_retrieval_split(document: Document) -> bool:
    """Karpathy's test split, as he gives it, or as BLIP and ARO read it: a path, and five captions of it."""
    if _karpathy(document):
        return True
    return document.columns == {"image", "caption"} and all(
        isinstance(row.get("image"), str)
        and isinstance(row.get("caption"), list | tuple)
        and len(row["caption"]) >= _CAPTIONS
        and re.search("coco|flickr", f"{row['image']} {document.shown}".lower())
        for row in probe(document)
    )


_SAID = (
    "answer",
    "label",
    "correct",
    "correct_answer",
    "correct_option",
    "answer_index",
    "target",
    "gt",
    "ground_truth",
)


def _first_is_right(row: Row) -> tuple[str, ...]:
    """The options of a row, of which the first is right.

    Raises:
        SampleError: The row says of another one that it is.
    """
    options = sentences(row, "caption_options")
    for key in _SAID:
        value = row.get(key)
        if not says_none(value) and str(value).strip() not in ("0", "A", options[0]):
            raise SampleError(
                f"{key!r} is {str(value)[:60]!r}, but as published the first of 'caption_options' is right; put the right one "
                f"first and take {key!r} away"
            )
    return options


def _order_item(pictures: Pictures, document: Document, index: int, row: Row) -> CaptionItem:
    if "correct_caption" in row:
        wrong = sorted((key for key in row if re.fullmatch(r"hard_text_\d+", key)), key=lambda key: int(key[10:]))
        captions = (sentence(row, "correct_caption"), *(sentence(row, key) for key in wrong if row[key] is not None))
    else:
        captions = _first_is_right(row)
    return _ranked(picture_of(document, index, row, pictures), captions)


def _ranked(image: ImageSource, captions: Sequence[str]) -> CaptionItem:
    """An item whose first caption is the right one; wrong ones that are the same sentence would be no choice."""
    kept = tuple(dict.fromkeys(captions))
    if len(kept) < 2:
        raise SampleError(f"it has no wrong caption beside {captions[0][:60]!r}")
    fits = tuple(place == 0 for place in range(len(kept)))
    return CaptionItem(item_id="", images=(image,), captions=kept, fits=(fits,))


def plain_caption(caption: str) -> str:
    """A caption as ARO writes it: lower case, without most punctuation, 30 words at most."""
    words = re.sub(r'[.!"()*#:;~]', " ", caption.lower()).split()
    return " ".join(words[:_LONGEST_ORDER])


def shuffled_captions(caption: str, seed: str) -> list[str]:
    """Two wrong orders of a caption's words: within each group of three, and of the groups; none that reads the same.

    The same for the same seed, on any machine.
    """
    draw = random.Random(seed)
    words = caption.split()
    groups = [words[start : start + 3] for start in range(0, len(words), 3)]
    found = []
    for within in (True, False):
        for _ in range(20):
            mixed = [draw.sample(group, len(group)) for group in groups] if within else draw.sample(groups, len(groups))
            text = " ".join(word for group in mixed for word in group)
            if text != caption and text not in found:
                found.append(text)
                break
    return found


def _raw(texts: Any) -> list[str]:
    listed = texts if isinstance(texts, list) else []
    return [str(text["raw"]) for text in listed if isinstance(text, dict) and "raw" in text]


def _split_rows(document: Document) -> Document:
    """A row a caption of the test split, with the orders that are made of it."""
    if document.rows:
        captions = [(row.get("image"), row.get("caption")) for row in document.rows]
    else:
        captions = [
            ("/".join(str(entry[key]) for key in ("filepath", "filename") if entry.get(key)), _raw(entry["sentences"]))
            for entry in _karpathy(document)
            if entry["split"] == "test"
        ]
    rows = []
    for place, (image, texts) in enumerate(captions):
        for number, text in enumerate(texts if isinstance(texts, list | tuple) and texts else [None]):
            right = plain_caption(text) if isinstance(text, str) else ""
            options = [right, *shuffled_captions(right, f"{image} {number}")]
            rows.append({"id": f"{place}.{number}", "image": image, "caption_options": options})
    return Document(document.path, document.shown, rows)


def _read_orders(documents: Sequence[Document], pictures: Pictures) -> Iterator[Benchmark | Unread]:
    by_name: dict[str, list[Document]] = {}
    for document in documents:
        if document.has("caption_options") and _sort_of_options(document) != "order":
            yield Unread(
                document,
                "its caption_options are no orders of one sentence, and no captions of places; of two captions that differ "
                "otherwise the files do not say which one is right: take the table with true_caption, false_caption",
            )
            continue
        if (images := _karpathy(document)) and all(entry["split"] != "test" for entry in images):
            yield Unread(document, "none of its pictures is of the test split, which is asked about")
            continue
        if _is_retrieval_split(document) and {"val", "train"} & set(re.split("[^a-z]+", document.path.stem.lower())):
            yield Unread(document, "its name says that it is not the test split, which is asked about")
            continue
        shown = next(probe(document), None) or next(iter(_karpathy(document)), {})
        told = " ".join([*path_parts(document), *(str(shown[key]) for key in ("image", "filepath") if key in shown)])
        task = next((name for name in ("flickr", "coco") if name in told.lower()), "")
        split = "-split" if _is_retrieval_split(document) else ""
        by_name.setdefault(f"aro-{task}-order{split}" if task else f"aro-order{split}", []).append(document)
    for name, members in by_name.items():
        for named, group in benchmarks_of(name, members, lambda _: ""):
            made_here = name.endswith("-split")
            opened = [_split_rows(document) for document in group] if made_here else group
            note = (
                f"the wrong orders were made here, two of the published four ({'; '.join(_ORDERS)}): the other two need a "
                "tagger; for scores that compare with published ones take the hub's table (correct_caption, hard_text_1 ...)"
            )
            yield benchmark(
                named,
                layout="aro-order",
                title=f"ARO: {'Flickr30k' if 'flickr' in name else 'COCO'}-Order",
                metric="aro-order",
                found=gather(opened, partial(_order_item, pictures), lambda *_: ""),
                documents=group,
                notes=[note] if made_here else [],
            )


# --- What's Up ---


def _listed(document: Document) -> Sequence[Sequence[Any]]:
    """Entries ``[number of the picture, right caption, wrong caption]``; none in other files."""
    top = document.top
    if not isinstance(top, list) or not top:
        return ()
    first = top[:32]
    known = [entry for entry in first if _is_entry(entry) and _sort_of(entry[1:]) == "places"]
    return top if known and 2 * len(known) >= len(first) else ()


def _is_entry(entry: Any) -> bool:
    if not isinstance(entry, list) or len(entry) < 3 or not isinstance(entry[0], int | str):
        return False
    return all(isinstance(text, str) and text for text in entry[1:])


def _is_whats_up(document: Document) -> bool:
    if _listed(document):
        return True
    if not names_picture(document):
        return False
    if document.has("caption_options"):
        return _sort_of_options(document) == "places"
    return document.has("original_file_name", "positive_caption", "negative_caption") and all(
        _up_family(str(row.get("original_file_name"))) for row in probe(document)
    )


def _up_family(name: str) -> str:
    """What a name says of the subset: ``controlled``, ``coco-two``, ``gqa``; nothing from others."""
    words = re.split(r"[^a-z0-9]+", name.lower())
    if "controlled" in words:
        return "controlled"
    family = "coco" if "coco" in words else "gqa" if {"vg", "gqa"} & set(words) else ""
    things = next((word for word in words if word in ("one", "two")), "")
    return f"{family}-{things}".strip("-") if family else ""


def _up_kind(options: Sequence[str], family: str) -> str:
    """``controlled-a``, ``coco-two``: the subset as published, told by the captions, and what names say of it."""
    if len(options) > 2 or family == "controlled":
        return f"controlled-{'a' if {'on', 'under'} & set(_controlled_places(options)) else 'b'}"
    if "-" in family:
        return family
    # What is said of one thing ends with its place; of two, with the other one.
    return f"{family or 'objects'}-{'two' if _around_place(options)[1] else 'one'}"


def _up_options(row: Row) -> tuple[str, ...]:
    if row.get("caption_options") is not None:
        return _first_is_right(row)
    return (*sentences(row, "positive_caption")[:1], *sentences(row, "negative_caption"))


def _up_item(pictures: Pictures, document: Document, index: int, row: Row) -> CaptionItem:
    options = _up_options(row)
    kind = _up_row_kind(document, row)
    item = _ranked(_up_picture(pictures, document, index, row), options)
    if not kind.startswith("controlled"):
        return item
    place = _controlled_places(options)[0]
    shown = re.findall(r"(?<=_)(on|under|behind|front|left|right)(?=_)", str(row.get("image_path")).replace("-", "_"))
    if len(shown) == 1 and place != shown[0]:
        raise SampleError(
            f"the picture {str(row['image_path'])[-60:]!r} is called after another place than the right caption says, "
            f"{options[0][:60]!r}; as published the first of 'caption_options' is right"
        )
    # Four pictures of the same two things are a set.
    before, after, _ = _around_place(options)
    things = " ".join(word for word in (*before, *after) if word not in _AROUND)
    return replace(item, group=f"{kind}/{things}", extra={"place": place})


def _up_row_kind(document: Document, row: Row) -> str:
    """The subset: by the file's name, or the word of the row that says most."""
    told, of_path = max([*map(_up_family, names_in(row)), ""], key=len), kind_in_path(document, _up_family)
    return _up_kind(_up_options(row), of_path if of_path.startswith(told) else told)


def _up_picture(pictures: Pictures, document: Document, index: int, row: Row) -> ImageSource:
    if "number" not in row:
        return picture_of(document, index, row, pictures)
    name, family, near = str(row["number"]), row["family"], document.path.parent
    if family == "gqa":
        return pictures.find(name, near=near)
    found = _first_found(pictures, [f"{prefix}{name.zfill(12)}" for prefix in _COCO_PREFIXES], near)
    if found is None:
        raise SampleError(
            f"no picture {name.zfill(12)}.jpg; put the folder of COCO's val2017 there, or name its folder with --images"
        )
    return found


_COCO_PREFIXES = ("", "COCO_val2014_", "COCO_train2014_")


def _first_found(pictures: Pictures, names: Sequence[str], near: Any) -> ImageSource | None:
    for name in names:
        try:
            return pictures.find(name, near=near)
        except SampleError:
            continue
    return None


def _up_rows(document: Document, pictures: Pictures) -> Document | Unread:
    """A list of lists as rows; whose numbers they are is told by the file's name, else by which pictures are there."""
    entries = _listed(document)
    family = kind_in_path(document, _up_family).partition("-")[0]
    if not family:
        near = document.path.parent
        numbers = [str(entry[0]) for entry in entries if _is_entry(entry)]
        there = {
            "coco": [_first_found(pictures, [f"{p}{n.zfill(12)}" for p in _COCO_PREFIXES], near) for n in numbers],
            "gqa": [_first_found(pictures, [number], near) for number in numbers],
        }
        fitting = [name for name, found in there.items() if any(image is not None for image in found)]
        if len(fitting) != 1:
            return Unread(
                document,
                f"its numbers are of COCO's pictures (000000000139.jpg) or of Visual Genome's (139.jpg), and "
                f"{'both' if fitting else 'neither'} are there; call it coco_... or vg_..., as published",
            )
        family = fitting[0]
    rows = [
        {"id": f"{place}", "number": entry[0], "caption_options": entry[1:], "family": family}
        if _is_entry(entry)
        else {"id": f"{place}", "caption_options": entry}
        for place, entry in enumerate(entries)
    ]
    return Document(document.path, document.shown, rows)


_UP_SUBSETS = ("controlled-a", "controlled-b", "coco-one", "coco-two", "gqa-one", "gqa-two")


def _read_whats_up(documents: Sequence[Document], pictures: Pictures) -> Iterator[Benchmark | Unread]:
    opened: list[Document] = []
    for document in documents:
        ready = document if document.rows else _up_rows(document, pictures)
        if isinstance(ready, Unread):
            yield ready
        else:
            opened.append(ready)

    def subset(document: Document) -> str:
        first: Mapping[str, Any] = next(probe(document), {})
        try:
            return "" if "original_file_name" in first else _up_row_kind(document, first)
        except SampleError:
            return ""

    for named, group in benchmarks_of("whats-up", opened, subset):
        found = gather(group, partial(_up_item, pictures), _up_row_kind)
        notes = missing_kinds("subsets", _UP_SUBSETS, [item.kind for item in found.items])
        yield benchmark(
            named, layout="whats-up", title="What's Up", metric="whats-up", found=found, documents=group, notes=notes
        )


_VG = "pictures: Visual Genome, CC BY 4.0"

LAYOUTS: tuple[Layout, ...] = (
    Layout(
        name="aro",
        title="ARO: VG-Relation and VG-Attribution",
        looks_for="rows with image_path (or image), true_caption, false_caption, bbox_x, bbox_y, bbox_w, bbox_h; relation_name "
        "or attributes",
        source="https://github.com/mertyg/vision-language-models-are-bows; hub: mteb/ARO-Visual-Relation, "
        "mteb/ARO-Visual-Attribution",
        licence=f"MIT; {_VG}",
        scores="likelihood, the mean over relations that can be told from their reverse, or over pairs of attributes with 25 "
        "items; both orders of the letter question; P(yes)",
        recognises=_is_aro_pair,
        read=lambda documents, pictures: list(_read_aro_pairs(documents, pictures)),
    ),
    Layout(
        name="whats-up",
        title="What's Up",
        looks_for="rows with image_path (or image_options) and caption_options that differ by a place, the first right; a list "
        "of [number of the picture, right caption, wrong caption]; original_file_name, positive_caption, negative_caption",
        source="https://github.com/amitakamath/whatsup_vlms; hub: ServiceNow/whatsup_all, Mayfull/whats_up_vlms",
        licence=f"MIT; own pictures; COCO, terms of Flickr; {_VG}",
        scores="single pictures, pairs of opposite places and sets of four, by likelihood and by P(yes), a subset and in the mean",
        recognises=_is_whats_up,
        read=lambda documents, pictures: list(_read_whats_up(documents, pictures)),
    ),
    Layout(
        name="aro-order",
        title="ARO: COCO-Order and Flickr30k-Order",
        looks_for="rows with correct_caption and hard_text_1 ..., or caption_options that are orders of one sentence; a list of "
        "image and five captions (Karpathy's test split)",
        source="https://huggingface.co/datasets/mteb/ARO-COCO-order, "
        "https://huggingface.co/datasets/mteb/ARO-Flickr-Order; the split: coco_karpathy_test.json or dataset_coco.json",
        licence="MIT; pictures: COCO or Flickr30k, terms of Flickr",
        scores="likelihood of the right order above all others",
        recognises=_is_order,
        read=lambda documents, pictures: list(_read_orders(documents, pictures)),
    ),
)
