"""Questions answered in a few words: VQAv2, OK-VQA, TextVQA, VizWiz, GQA, DocVQA, InfographicVQA, ChartQA.

Each is read from its authors' JSON, from the tables of the hub (pictures in the rows), and from VLMEvalKit's TSV.
"""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm_distill_cache.common.errors import SampleError
from vlm_distill_cache.data.benchmarks.documents import KEY, Document, readable
from vlm_distill_cache.data.benchmarks.items import Benchmark
from vlm_distill_cache.data.benchmarks.layouts import Layout, Unread
from vlm_distill_cache.data.benchmarks.open_questions import (
    IN_A_WORD,
    TEN,
    Entries,
    Found,
    answers_of,
    entries_of,
    is_table_of_texts,
    named,
    picture_in,
    row_id,
    split_of,
    top_text,
)
from vlm_distill_cache.data.benchmarks.pictures import Pictures
from vlm_distill_cache.data.benchmarks.vqa_files import VQA
from vlm_distill_cache.data.sources.printed import printed

_SINGLE_WORD = "Answer the question with a single word."
_OR_UNANSWERABLE = f"When the provided information is insufficient, respond with 'Unanswerable'.\n{IN_A_WORD}"
_SEMANTIC = {"attr": "attribute", "cat": "category", "global": "scene", "obj": "object", "rel": "relation"}
_GQA_COMMON = ("color", "material", "shape")  # what GQA's questions about things in common are answered with
_FLAGS = {"0": 0, "1": 1, "0.0": 0, "1.0": 1, "false": 0, "true": 1}
_ANOTHER_TASK = re.compile(r"caption|reference|label|grounding|rationale|src_dataset")
_CHART = re.compile(r"(?:(?:train|val|test)[_ -]?)?(human|augmented|machine)(?:[_ -]?(?:train|val|test))?")
_OTHER_CHARTS = re.compile(r"(?:plot|figure|dv|leaf)[_-]?qa|chartqa[_-]?pro|opencqa")  # their keys are the same
_IN_A_NAME = re.compile(r"(?<![a-z])(human|augmented|machine)(?![a-z])")
_PARTS = re.compile(r"_\d+$")


def _is_evalkit(entries: Entries, *names: str) -> bool:
    """Whether this is one of VLMEvalKit's TSVs, which only its name tells from the others of its columns."""
    document = entries.document
    starts = document.path.stem.lower().replace("-", "_").startswith(names)
    return is_table_of_texts(document) and entries.has("index", "question") and starts


def _is_another_task(entries: Entries) -> bool:
    """Whether there is something else to say about its pictures and questions: captions, places, why answers differ."""
    return any(_ANOTHER_TASK.search(key.lower()) for key in entries.keys)


# TextVQA


def _is_textvqa(document: Document) -> bool:
    entries = entries_of(document)
    name = top_text(document, "dataset_name").lower()
    telling = entries.has_any("image_classes", "flickr_300k_url", "flickr_original_url")
    published = entries.has("question", "question_id", "image_id") and telling and name in ("", "textvqa")
    published = published and not _is_another_task(entries)
    return published or _is_evalkit(entries, "textvqa")


def _read_textvqa(documents: Sequence[Document], pictures: Pictures) -> list[Benchmark]:
    def read(document: Document) -> Benchmark:
        entries, found = entries_of(document), Found(pictures, TEN)
        split = split_of(document, top_text(document, "dataset_type"), str(entries.first.get("set_name") or ""))
        folder = "test_images" if split == "test" else "train_images"  # where the authors' archives put them
        for index, row in entries.each(found.left_out):
            names = [str(row[key]) for key in ("image_name", "image_id") if row.get(key)]
            found.add(
                row_id(row, "question_id", "index", default=index),
                row.get("question"),
                row.get("answers", row.get("answer")),
                lambda at=index, names=names: picture_in(entries, at, pictures, named=names, hints=[folder]),
                listed=is_table_of_texts(document),
            )
        notes = ["asked without OCR tokens, which some publications show the model"]
        return found.benchmark(
            name=named("textvqa", split),
            layout="textvqa",
            title="TextVQA",
            metric="textvqa_accuracy",
            instruction=IN_A_WORD,
            documents=[document],
            notes=notes,
        )

    return [read(document) for document in documents]


# VizWiz


def _is_vizwiz(document: Document) -> bool:
    entries = entries_of(document)
    called = [str(entries.first.get(key) or "").lower() for key in ("image", "question_id", "filename", "image_id")]
    from_vizwiz = any(Path(name).name.startswith("vizwiz") for name in called)
    answered = entries.has("answers", "answerable") and entries.has_any("image", "filename", "image_id")
    published = (answered or from_vizwiz) and not _is_another_task(entries)
    return entries.has("question") and (published or _is_evalkit(entries, "vizwiz"))


def _read_vizwiz(documents: Sequence[Document], pictures: Pictures) -> list[Benchmark]:
    def read(document: Document) -> Benchmark:
        entries, found = entries_of(document), Found(pictures, TEN)
        split = split_of(document, *[str(entries.first.get(key) or "") for key in ("question_id", "filename")])
        for index, row in entries.each(found.left_out):
            kind = str(row.get("answer_type") or row.get("category") or "")
            answerable = _FLAGS.get(str(row.get("answerable")).lower())
            if answerable is None and kind:
                answerable = int(kind != "unanswerable")
            names = [str(row[key]) for key in ("filename", "image_id", "question_id") if row.get(key)]
            picture = row.get("image")
            found.add(
                row_id(
                    row,
                    "filename",
                    "question_id",
                    default=picture if isinstance(picture, str) and len(picture) < 200 else row.get("index", index),
                ),
                row.get("question"),
                row.get("answers", row.get("answer")),
                lambda at=index, names=names: picture_in(
                    entries, at, pictures, named=names, hints=[split] if split else []
                ),
                listed=is_table_of_texts(document),
                kind=kind,
                extra={} if answerable is None else {"answerable": answerable},
            )
        return found.benchmark(
            name=named("vizwiz", split),
            layout="vizwiz",
            title="VizWiz-VQA",
            metric="vizwiz_accuracy",
            instruction=_OR_UNANSWERABLE,
            documents=[document],
        )

    return [read(document) for document in documents]


# GQA


def _is_gqa(document: Document) -> bool:
    entries = entries_of(document)
    questions = entries.has("question", "imageId") and entries.has_any("answer", "isBalanced", "types", "fullAnswer")
    return questions or _is_gqa_pictures(entries) or _is_gqa_choices(entries) or _is_evalkit(entries, "gqa")


def _is_gqa_pictures(entries: Entries) -> bool:
    return entries.keys == {"id", "image"} and not isinstance(entries.first["image"], str)


def _is_gqa_choices(entries: Entries) -> bool:
    return entries.keys == {KEY, "valid", "plausible"}


def _read_gqa(documents: Sequence[Document], pictures: Pictures) -> list[Benchmark | Unread]:
    stored: dict[str, tuple[Document, int]] = {}
    choices: dict[str, Mapping[str, Any]] = {}
    parts: dict[tuple[str, str, str], list[Document]] = defaultdict(list)
    beside: list[Document] = []
    for document in documents:
        entries = entries_of(document)
        if _is_gqa_pictures(entries):
            stored |= {str(row["id"]): (document, index) for index, row in enumerate(entries.rows)}
            beside.append(document)
        elif _is_gqa_choices(entries):
            choices |= {str(row[KEY]): row for row in entries.rows}
            beside.append(document)
        else:  # train_all_questions_0.json and following are parts of one file
            shown = Path(document.shown)
            parts[str(shown.parent), _PARTS.sub("", shown.stem), shown.suffix].append(document)
    read = [_gqa_benchmark(part, pictures, stored, choices) for part in parts.values()]
    if not read:
        why = "there is no file of questions for it; looked for imageId, question, answer by the question's id"
        return [Unread(document, why) for document in beside]
    return list(read)


def _gqa_benchmark(
    documents: Sequence[Document],
    pictures: Pictures,
    stored: Mapping[str, tuple[Document, int]],
    choices: Mapping[str, Mapping[str, Any]],
) -> Benchmark:
    found = Found(pictures)
    balanced = any(_is_balanced(row) for document in documents for row in readable(entries_of(document).rows))
    entailed_by_any: set[str] = set()
    for document in documents:
        entries = entries_of(document)
        for index, row in entries.each(found.left_out):
            item_id = str(row_id(row, "id", "questionId", "question_id", "index", default=index))
            image = str(row.get("imageId") or "")
            try:
                extra = _gqa_extra(row, choices.get(item_id, {}))
            except SampleError as error:
                found.left_out[item_id] = f"{document.shown}: {error}"
                continue
            if balanced:
                extra["balanced"] = _is_balanced(row)
            entailed_by_any |= set(extra.get("entailed", ()))

            def find(entries: Entries = entries, at: int = index, image: str = image) -> Any:
                if image in stored:
                    return stored[image][0].picture(stored[image][1], "image")
                return picture_in(entries, at, pictures, named=[image])

            found.add(item_id, row.get("question"), row.get("answer"), find, extra=extra)
    notes = []
    if not balanced and "isBalanced" in entries_of(documents[0]).keys:
        notes.append("none of its questions is balanced, so that all count; published scores are over balanced ones")
    missing = entailed_by_any - {item.item_id for item in found.items}
    if missing:
        notes.append(
            f"{len(missing)} of {len(entailed_by_any)} questions that others entail are not in it, so that consistency is over "
            "the rest; published consistency needs the file of all questions"
        )
    if not choices:
        notes.append("without its choices file (val_choices.json) there is no validity and no plausibility")
    first = documents[0]
    shown = Path(first.shown.lower())
    whole = "all" if re.search(r"(?<![a-z])all(?![a-z])", f"{shown.parent.name}/{shown.stem}") else ""
    return found.benchmark(
        name=named("gqa", "-".join(filter(None, (split_of(first, shown.parent.name), whole)))),
        layout="gqa",
        title="GQA",
        metric="gqa_accuracy",
        instruction=IN_A_WORD,
        documents=documents,
        notes=notes,
    )


def _is_balanced(row: Mapping[str, Any]) -> bool:
    return _FLAGS.get(str(row.get("isBalanced")).lower()) == 1


def _gqa_extra(row: Mapping[str, Any], choices: Mapping[str, Any]) -> dict[str, Any]:
    extra: dict[str, Any] = {}
    row = {
        **row,
        **{key: printed(row[key]) for key in ("types", "groups") if isinstance(row.get(key), str)},
    }  # of CSV files
    told = row.get("types")
    types: Mapping[str, Any] = told if isinstance(told, Mapping) else {}
    structural, semantic, detailed = (str(types.get(key) or "") for key in ("structural", "semantic", "detailed"))
    if structural or semantic:
        kind = {"": "", "query": "open"}.get(structural, "binary")
        extra["subsets"] = [name for name in (kind, structural, _SEMANTIC.get(semantic, semantic)) if name]
    entailed = row.get("entailed")
    entailed = re.findall(r"\w+", entailed) if isinstance(entailed, str) else entailed
    if entailed:
        extra["entailed"] = _texts("entailed", entailed)
    groups = row.get("groups")
    if isinstance(groups, Mapping) and groups.get("global"):
        extra["group"] = str(groups["global"])
    for name in ("valid", "plausible"):
        if name in choices:
            extra[name] = list(_GQA_COMMON) if "Common" in detailed else _texts(name, choices[name])
    return extra


def _texts(key: str, value: Any) -> list[str]:
    if not isinstance(value, list | tuple):
        raise SampleError(f"{key!r} must be a list, got {str(value)[:60]!r}")
    return [str(each) for each in value]


# DocVQA and InfographicVQA


def _is_docvqa(document: Document) -> bool:
    entries = entries_of(document)
    told = entries.has_any(
        "docId", "ucsf_document_id", "image_local_name", "image_url", "ocr_output_file", "data_split"
    )
    one_picture = entries.has_any(
        "image", "image_local_name", "image_path", "ucsf_document_id"
    )  # DUDE shows whole documents
    published = entries.has("question") and entries.has_any("questionId", "ucsf_document_id") and told and one_picture
    one_page = not entries.has_any("page_ids", "answer_page_idx")  # MP-DocVQA shows several pages
    return (published and one_page) or _is_evalkit(entries, "docvqa", "infovqa", "infographicvqa")


def _read_docvqa(documents: Sequence[Document], pictures: Pictures) -> list[Benchmark]:
    def read(document: Document) -> Benchmark:
        entries, found = entries_of(document), Found(pictures)
        split = split_of(document, top_text(document, "dataset_split"), str(entries.first.get("data_split") or ""))
        graphic = entries.has_any("image_local_name", "ocr_output_file", "operation/reasoning", "image_url")
        graphic = graphic or "info" in f"{top_text(document, 'dataset_name')}/{document.path.stem}".lower()
        for index, row in entries.each(found.left_out):
            page = (
                [f"{row.get('ucsf_document_id')}_{row.get('ucsf_document_page_no')}"]
                if row.get("ucsf_document_id")
                else []
            )
            names = [str(row[key]) for key in ("image_local_name",) if row.get(key)] or page
            said = (row.get(key) for key in ("question_types", "answer_type", "operation/reasoning"))
            kinds = [answers_of((printed(value) if isinstance(value, str) else None) or value) for value in said]
            found.add(
                row_id(row, "questionId", "question_id", "index", default=index),
                row.get("question"),
                row.get("answers", row.get("answer")),
                lambda at=index, names=names: picture_in(entries, at, pictures, named=names),
                listed=is_table_of_texts(document),
                extra={"subsets": subsets} if (subsets := [kind for listed in kinds for kind in listed]) else {},
            )
        return found.benchmark(
            name=named("infographicvqa" if graphic else "docvqa", split),
            layout="docvqa",
            title="InfographicVQA" if graphic else "DocVQA",
            metric="anls",
            instruction=IN_A_WORD,
            documents=[document],
        )

    return [read(document) for document in documents]


# ChartQA


def _is_chartqa(document: Document) -> bool:
    entries = entries_of(document)
    first, path = entries.first, document.shown.lower()
    said = [str(first.get(key)).lower() for key in ("type", "split")]
    who = "human_or_machine" in entries.keys or any(map(_CHART.fullmatch, said))
    if not entries.has("query", "label") and "chart" not in path:  # else "human" may be said of anything
        who = any("_" in each and _CHART.fullmatch(each) for each in said)
    asked = entries.has("query", "label") or entries.has("question", "answer")
    published = entries.has("imgname", "query", "label") or (asked and who and "image" in entries.keys)
    return (published and not _OTHER_CHARTS.search(path)) or _is_evalkit(entries, "chartqa")


def _chart_kind(*said: Any) -> str:
    """Who asked: people, or a model from the chart's summary."""
    kinds = {"0": "human", "1": "augmented", "human": "human", "machine": "augmented", "augmented": "augmented"}
    texts = [str(each).lower() for each in said if each is not None]
    named = [found[1] if (found := _CHART.fullmatch(text)) else text for text in texts]
    return next((kinds[text] for text in named if text in kinds), "")


def _kind_of_file(shown: str) -> str:
    found = [each for part in reversed(Path(shown.lower()).parts) if (each := _IN_A_NAME.search(part))]
    return _chart_kind(found[0][1]) if found else ""


def _is_list_of_texts(value: Any) -> bool:
    """Whether a text is a list of texts: of numbers it may be the answer itself."""
    found = printed(value) if isinstance(value, str) else None
    return isinstance(found, list) and all(isinstance(each, str) for each in found)


def _read_chartqa(documents: Sequence[Document], pictures: Pictures) -> list[Benchmark]:
    together: dict[tuple[Path, str], list[Document]] = defaultdict(list)  # test_human.json and test_augmented.json
    for document in documents:
        first = entries_of(document).first
        split = split_of(document, str(first.get("split") or first.get("type") or "").replace("_", " "))
        together[document.path.parent, split].append(document)

    def read(split: str, parts: Sequence[Document]) -> Benchmark:
        found = Found(pictures)
        for document in parts:
            entries = entries_of(document)
            by_file = _kind_of_file(document.shown)
            for index, row in entries.each(found.left_out):
                told = (row.get("human_or_machine"), row.get("type"), row.get("split"), by_file)
                kind = _chart_kind(*told)
                names = [str(row["imgname"])] if row.get("imgname") else []
                found.add(
                    row_id(row, "id", "index", default=f"{kind or 'question'}-{index}"),
                    row.get("query", row.get("question")),
                    row.get("label", row.get("answer")),
                    lambda at=index, names=names, entries=entries: picture_in(
                        entries, at, pictures, named=names, hints=[split] if split else []
                    ),
                    listed=is_table_of_texts(document) and _is_list_of_texts(row.get("label")),
                    kind=kind,
                )
        return found.benchmark(
            name=named("chartqa", split),
            layout="chartqa",
            title="ChartQA",
            metric="relaxed_accuracy",
            instruction=_SINGLE_WORD,
            documents=parts,
        )

    return [read(split, parts) for (_, split), parts in together.items()]


LAYOUTS: tuple[Layout, ...] = (
    Layout(
        name="textvqa",
        title="TextVQA",
        looks_for="entries with question_id, question, image_id, answers and image_classes or flickr_300k_url, no captions: the "
        "JSON's list under data, or rows of a table with image; TextVQA_VAL.tsv",
        source="https://textvqa.org/dataset (TextVQA_0.5.1_val.json, train_val_images.zip); hub: lmms-lab/textvqa",
        licence="CC BY 4.0; pictures of Open Images: CC BY 2.0",
        scores="VQA accuracy over ten answers, normalised as TextVQA's server does",
        recognises=_is_textvqa,
        read=_read_textvqa,
    ),
    VQA,
    Layout(
        name="vizwiz",
        title="VizWiz-VQA",
        looks_for="entries with image, question, answers, answerable; or whose picture is called VizWiz_...; no captions, no "
        "grounding; VizWiz.tsv",
        source="https://vizwiz.org/tasks-and-datasets/vqa (Annotations.zip, val.zip, test.zip); hub: lmms-lab/VizWiz-VQA",
        licence="CC BY 4.0",
        scores="VQA accuracy over ten answers, by answer type; as vqaEval.py; precision, recall and F1 of saying that a "
        "question cannot be answered",
        recognises=_is_vizwiz,
        read=_read_vizwiz,
    ),
    Layout(
        name="gqa",
        title="GQA",
        looks_for="an object of questions by id, or rows of a table, with imageId, question, answer, types, isBalanced, entailed; "
        "beside it tables of id and image, choices (valid, plausible) by id; GQA_TestDev_Balanced.tsv",
        source="https://cs.stanford.edu/people/dorarad/gqa/download.html (questions1.2.zip, images.zip); hub: lmms-lab/GQA",
        licence="CC BY 4.0; pictures of Visual Genome (COCO, YFCC100M): those of Flickr",
        scores="accuracy over balanced questions, binary and open, by structural and semantic type; "
        "consistency, distribution; validity and plausibility with the choices file",
        recognises=_is_gqa,
        read=_read_gqa,
    ),
    Layout(
        name="docvqa",
        title="DocVQA, InfographicVQA",
        looks_for="entries with questionId, question, answers, one picture (image, image_local_name, ucsf_document_id) and docId, "
        "ocr_output_file or data_split: the JSON's list under data, or rows of a table; DocVQA_VAL.tsv, InfoVQA_VAL.tsv",
        source="https://rrc.cvc.uab.es/?ch=17 (val_v1.0_withQT.json, spdocvqa_images.tar.gz); hub: lmms-lab/DocVQA",
        licence="for research, after registration; pages of the UCSF Industry Documents Library",
        scores="ANLS (threshold 0.5, best over answers), by question type",
        recognises=_is_docvqa,
        read=_read_docvqa,
    ),
    Layout(
        name="chartqa",
        title="ChartQA",
        looks_for="entries with imgname, query, label; or with image, query and label (or question and answer), and "
        "human_or_machine, or a type or split that is human_test or augmented_test; not below a folder called after another set of "
        "charts (PlotQA, FigureQA); ChartQA_TEST.tsv",
        source="https://github.com/vis-nlp/ChartQA (ChartQA Dataset/test); hub: HuggingFaceM4/ChartQA, lmms-lab/ChartQA",
        licence="GPL-3.0",
        scores="relaxed accuracy (5 %), of people's and of a model's questions",
        recognises=_is_chartqa,
        read=_read_chartqa,
    ),
)
