"""What compositional benchmarks show: pictures with captions that fit and captions that do not.

Each layout is told in every form that it is published in: the authors' JSON, tables of the hub with pictures in them, and
the JSON lines of the hub's `*_vlms` copies (``positive_caption``, ``negative_caption``).
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from vlm_distill_cache.common.errors import SampleError
from vlm_distill_cache.data.benchmarks import captions_of_relations
from vlm_distill_cache.data.benchmarks.caption_rows import (
    COCO_PICTURES,
    Make,
    Row,
    benchmark,
    benchmarks_of,
    by_subset,
    gather,
    has_coco_picture,
    kind_in_path,
    names_in,
    names_picture,
    picture_of,
    probe,
    sentence,
    sentences,
)
from vlm_distill_cache.data.benchmarks.documents import Document
from vlm_distill_cache.data.benchmarks.items import Benchmark, CaptionItem, missing_kinds
from vlm_distill_cache.data.benchmarks.layouts import Layout
from vlm_distill_cache.data.benchmarks.pictures import Pictures

_SUGAR = re.compile(r"(add|replace|swap)_?(obj|at|rel)")
_SUBSETS = ("add_att", "add_obj", "replace_att", "replace_obj", "replace_rel", "swap_att", "swap_obj")
_SUGAR_PARTS = {"obj": "obj", "at": "att", "rel": "rel"}  # one hub edition writes "atribute"
_TESTS = (
    "existence plurals counting_hard counting_small_quant counting_adversarial relations action_replacement actant_swap "
    "coreference_hard coreference_standard foil_it"
)
_INSTRUMENTS = tuple(_TESTS.split())
_OTHER_NAMES = {
    "counting_small": "counting_small_quant",
    "coref": "coreference_standard",
    "coref_hard": "coreference_hard",
    "relation": "relations",
    "action_replace": "action_replacement",
}


def _sugar(name: str) -> str:
    """``swap_att`` from a name that says it: ``swap_atribute``, ``SugarCrepe_swap_att``; nothing from others."""
    found = _SUGAR.search(re.sub(r"[^a-z]+", "_", name.lower()))
    return f"{found[1]}_{_SUGAR_PARTS[found[2]]}" if found else ""


# Of rows that hold more than a picture with a right and a wrong caption.
_NOT_SUGARCREPE = frozenset("caption2 foil answer correct chosen rejected conversations messages".split())  # noqa: SIM905


def _sugar_kind(document: Document, row: Row) -> str:
    named = [f"{row.get('type')}_{row.get('subtype')}", *names_in(row)]
    return next(filter(None, map(_sugar, named)), "") or kind_in_path(document, _sugar)


def _is_copy(document: Document, *keys: str) -> bool:
    """Whether it is a table of one of the hub's ``*_vlms`` copies with these keys."""
    return document.has("original_file_name", *keys) and names_picture(document)


def _is_sugarcrepe(document: Document) -> bool:
    document = by_subset(document, _sugar)
    if not has_coco_picture(document) or document.columns & _NOT_SUGARCREPE:
        return False
    if _is_copy(document, "positive_caption", "negative_caption"):
        return any(_sugar(str(row.get("original_file_name"))) for row in probe(document))
    return document.has("caption", "negative_caption") or document.has("tested_labels", "true_label")


def _tested(document: Document, row: Row) -> tuple[str, str]:
    """The right and the wrong one of two labels."""
    found = sentences({"tested_labels": document.named(row, "tested_labels")}, "tested_labels")
    right = document.named(row, "true_label")
    if len(found) != 2:
        raise SampleError(f"'tested_labels' holds {len(found)} captions, expected 2")
    if not isinstance(right, str):
        raise SampleError(
            f"'true_label' is {right!r}, and the table does not say which caption that is; take the table as published, which "
            "has names for its labels (reading them needs: pip install 'vlm-distill-cache[hf]')"
        )
    if right.strip() not in found:
        raise SampleError(f"'true_label' {right[:60]!r} is none of 'tested_labels'")
    place = found.index(right.strip())
    return found[place], found[1 - place]


def _sugarcrepe_item(pictures: Pictures, document: Document, index: int, row: Row) -> CaptionItem:
    if "tested_labels" in row:
        captions = _tested(document, row)
    else:
        captions = (sentence(row, "caption", "positive_caption"), sentence(row, "negative_caption"))
    image = picture_of(document, index, row, pictures, COCO_PICTURES)
    return CaptionItem(item_id="", images=(image,), captions=captions, fits=((True, False),))


def _read_sugarcrepe(documents: Sequence[Document], pictures: Pictures) -> Iterator[Benchmark]:
    yield from _of_subsets(
        documents, partial(_sugarcrepe_item, pictures), "sugarcrepe", title="SugarCrepe", metric="sugarcrepe"
    )


def _of_subsets(
    documents: Sequence[Document], make: Make, name: str, *, title: str, metric: str
) -> Iterator[Benchmark]:
    """Benchmarks whose files are SugarCrepe's subsets."""
    opened = [by_subset(document, _sugar) for document in documents]
    for named, group in benchmarks_of(name, opened, lambda document: kind_in_path(document, _sugar)):
        found = gather(group, make, _sugar_kind)
        notes = [] if any(item.kind for item in found.items) or not found.items else [_NO_SUBSETS]
        subsets = [kind for kind in _SUBSETS if name == "sugarcrepe" or not kind.startswith("add")]
        notes += missing_kinds("subsets", subsets, [item.kind for item in found.items])
        yield benchmark(named, layout=name, title=title, metric=metric, found=found, documents=group, notes=notes)


_NO_SUBSETS = (
    "neither the rows nor the files' names tell the subsets (add_obj, swap_att, ...), so that the score is the mean over all "
    "items, not over subsets"
)


def _is_sugarcrepe_pp(document: Document) -> bool:
    document = by_subset(document, _sugar)
    if not has_coco_picture(document):
        return False
    return document.has("caption", "caption2", "negative_caption") or document.has(
        "positive_caption_1", "positive_caption_2", "negative_caption"
    )


def _sugarcrepe_pp_item(pictures: Pictures, document: Document, index: int, row: Row) -> CaptionItem:
    captions = (
        sentence(row, "caption", "positive_caption_1"),
        sentence(row, "caption2", "positive_caption_2"),
        sentence(row, "negative_caption"),
    )
    image = picture_of(document, index, row, pictures, COCO_PICTURES)
    return CaptionItem(item_id="", images=(image,), captions=captions, fits=((True, True, False),))


def _read_sugarcrepe_pp(documents: Sequence[Document], pictures: Pictures) -> Iterator[Benchmark]:
    yield from _of_subsets(
        documents, partial(_sugarcrepe_pp_item, pictures), "sugarcrepe-pp", title="SugarCrepe++", metric="sugarcrepe-pp"
    )


def _is_winoground(document: Document) -> bool:
    return document.has("image_0", "image_1", "caption_0", "caption_1")


def _winoground_item(pictures: Pictures, document: Document, index: int, row: Row) -> CaptionItem:
    return CaptionItem(
        item_id="",
        images=tuple(picture_of(document, index, row, pictures, [f"image_{n}"]) for n in (0, 1)),
        captions=(sentence(row, "caption_0"), sentence(row, "caption_1")),
        fits=((True, False), (False, True)),
        extra={key: row[key] for key in ("tag", "secondary_tag", "num_main_preds") if row.get(key) is not None},
    )


def _is_bivlc(document: Document) -> bool:
    told = document.has("caption", "negative_caption") and names_picture(document)
    return told and any("negative_image" in row for row in probe(document))


def _bivlc_item(pictures: Pictures, document: Document, index: int, row: Row) -> CaptionItem:
    return CaptionItem(
        item_id="",
        images=(
            picture_of(document, index, row, pictures),
            picture_of(document, index, row, pictures, ["negative_image"]),
        ),
        captions=(sentence(row, "caption"), sentence(row, "negative_caption")),
        fits=((True, False), (False, True)),
        extra={key: row[key] for key in ("subtype",) if row.get(key) is not None},
    )


def _read_pairs(
    documents: Sequence[Document], pictures: Pictures, *, name: str, title: str, make: Any, kinds: Sequence[str]
) -> Iterator[Benchmark]:
    """Benchmarks of two pictures with two captions; the subset is the first of some columns that says something."""
    for named, group in benchmarks_of(name, documents, lambda _: ""):
        found = gather(group, partial(make, pictures), lambda document, row: _first_of(document, row, kinds))
        yield benchmark(named, layout=name, title=title, metric=name, found=found, documents=group)


def _first_of(document: Document, row: Row, keys: Sequence[str]) -> str:
    """What a row says under the first of some keys that its table has; never under one here and another one there."""
    return next((str(document.named(row, key) or "") for key in keys if document.has(key)), "")


def _is_valse(document: Document) -> bool:
    document = by_subset(document, _instrument)
    if _is_copy(document, "positive_caption", "negative_caption", "linguistic_phenomena"):
        return True
    return document.has("caption") and bool(document.columns & {"foil", "foils"}) and names_picture(document)


def _instrument(name: str) -> str:
    """``counting-hard`` from a name that says it; nothing from others."""
    plain = re.sub(r"[^a-z]+", "_", name.lower().removesuffix(".json")).strip("_")
    plain = _OTHER_NAMES.get(plain, plain)
    return next((known.replace("_", "-") for known in _INSTRUMENTS if known in plain), "")


def _valse_kind(document: Document, row: Row) -> str:
    named = [str(row[key]) for key in ("original_file_name", "instrument", "subset") if row.get(key)]
    told = next(filter(None, map(_instrument, named)), "") or kind_in_path(document, _instrument)
    return told or str(row.get("original_file_name") or row.get("linguistic_phenomena") or "")


def _votes(row: Row) -> int | None:
    """How many of three annotators chose the caption and not the foil; None: the row does not say."""
    votes = row.get("mturk")
    if isinstance(votes, str):
        try:
            votes = json.loads(votes.replace("'", '"'))
        except ValueError as error:
            raise SampleError(f"'mturk' must hold votes, as {{'caption': 3, ...}}, got {votes[:60]!r}") from error
    if votes is None:
        return None
    count = votes.get("caption") if isinstance(votes, Mapping) else None
    count = int(count) if isinstance(count, str) and count.isdecimal() else count
    if not isinstance(count, int | float):
        raise SampleError(f"'mturk' must hold the number of votes for 'caption', got {str(votes)[:60]}")
    return int(count)


def _valse_item(pictures: Pictures, document: Document, index: int, row: Row) -> CaptionItem | None:
    votes = _votes(row)
    if votes is not None and votes < 2:
        return None
    captions = (sentence(row, "caption", "positive_caption"), sentence(row, "foil", "foils", "negative_caption"))
    image = picture_of(document, index, row, pictures)
    return CaptionItem(
        item_id="",
        images=(image,),
        captions=captions,
        fits=((True, False),),
        extra={"voted": votes is not None},
    )


def _read_valse(documents: Sequence[Document], pictures: Pictures) -> Iterator[Benchmark]:
    def subset(document: Document) -> str:
        return kind_in_path(document, _instrument) or _valse_kind(document, next(probe(document), {}))

    opened = [by_subset(document, _instrument) for document in documents]
    for named, group in benchmarks_of("valse", opened, subset):
        found = gather(group, partial(_valse_item, pictures), _valse_kind)
        notes = []
        if found.passed_over:
            notes.append(
                f"{found.passed_over} instances are not asked: fewer than two of three annotators chose the caption and not "
                "the foil (mturk), as published"
            )
        if any(not item.extra["voted"] for item in found.items):
            notes.append("some rows have no annotators' votes (mturk) and are asked unseen")
        known = [name.replace("_", "-") for name in _INSTRUMENTS]
        notes += missing_kinds("instruments", known, [item.kind for item in found.items])
        yield benchmark(named, layout="valse", title="VALSE", metric="valse", found=found, documents=group, notes=notes)


_COCO = "pictures: COCO 2017 val, terms of Flickr"

LAYOUTS: tuple[Layout, ...] = (
    Layout(
        name="bivlc",
        title="BiVLC",
        looks_for="rows with image, caption, negative_image, negative_caption (type, subtype)",
        source="https://huggingface.co/datasets/imirandam/BiVLC",
        licence=f"MIT; {_COCO}, and generated ones",
        scores="group, text (I2T) and image (T2I) score and their halves, by P(yes), likelihood and letters; a type",
        recognises=_is_bivlc,
        read=lambda documents, pictures: list(
            _read_pairs(documents, pictures, name="bivlc", title="BiVLC", make=_bivlc_item, kinds=["type"])
        ),
    ),
    Layout(
        name="winoground",
        title="Winoground",
        looks_for="rows with image_0, image_1, caption_0, caption_1 (tag, secondary_tag, collapsed_tag)",
        source="https://huggingface.co/datasets/facebook/winoground (examples.jsonl with its pictures, or parquet)",
        licence="Meta's Winoground licence (research only); pictures: Getty Images",
        scores="group, text and image score, by P(yes), likelihood and letters; a tag",
        recognises=_is_winoground,
        read=lambda documents, pictures: list(
            _read_pairs(
                documents,
                pictures,
                name="winoground",
                title="Winoground",
                make=_winoground_item,
                kinds=["collapsed_tag", "tag"],
            )
        ),
    ),
    Layout(
        name="sugarcrepe-pp",
        title="SugarCrepe++",
        looks_for="rows with filename, caption, caption2, negative_caption; or positive_caption_1, positive_caption_2",
        source="https://github.com/Sri-Harsha/scpp, folder data; hub: Aman-J/SugarCrepe_pp, Mayfull/sugarcrepepp_vlms",
        licence=f"CC BY 4.0 by its page, MIT by its LICENSE; {_COCO}",
        scores="ITT (both right captions above the wrong one) by likelihood and P(yes), the mean over subsets; TOT by P(yes) that "
        "two captions mean the same; letters",
        recognises=_is_sugarcrepe_pp,
        read=lambda documents, pictures: list(_read_sugarcrepe_pp(documents, pictures)),
    ),
    Layout(
        name="sugarcrepe",
        title="SugarCrepe",
        looks_for=(
            "a dict of id to filename, caption, negative_caption, a file a subset; tables with image and caption, "
            "negative_caption or tested_labels, true_label; original_file_name, positive_caption, negative_caption"
        ),
        source=(
            "https://github.com/RAIVNLab/sugar-crepe, folder data; hub: HuggingFaceM4/SugarCrepe_swap_obj and its six sisters, "
            "mteb/SUGARCREPE_fmt, Mayfull/sugarcrepe_vlms"
        ),
        licence=f"MIT; {_COCO}",
        scores="likelihood, the mean over subsets, and a subset; the letter question in both orders, both right, letter bias; "
        "P(yes)",
        recognises=_is_sugarcrepe,
        read=lambda documents, pictures: list(_read_sugarcrepe(documents, pictures)),
    ),
    Layout(
        name="valse",
        title="VALSE",
        looks_for="a dict of id to image_file, caption, foil, mturk, a file an instrument; tables with image, caption, foil",
        source="https://github.com/Heidelberg-NLP/VALSE, folder data; hub: Mayfull/valse_vlms",
        licence="MIT; pictures: those of Visual7W, COCO, SWiG, VisDial and FOIL it!",
        scores="pairwise accuracy by likelihood and P(yes), the mean over instruments; accuracy, p_c and p_f of P(yes) > 1/2; "
        "letters",
        recognises=_is_valse,
        read=lambda documents, pictures: list(_read_valse(documents, pictures)),
    ),
    *captions_of_relations.LAYOUTS,
)
