"""Questions answered by yes or no: POPE, MME, HallusionBench; statements and LLaVA's question files have files of their own."""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from vlm_distill_cache.common.errors import SampleError
from vlm_distill_cache.data.benchmarks import question_files, statements
from vlm_distill_cache.data.benchmarks.documents import LONGEST_INDEX, Document
from vlm_distill_cache.data.benchmarks.items import Benchmark, YesNoItem
from vlm_distill_cache.data.benchmarks.layouts import Layout, Unread
from vlm_distill_cache.data.benchmarks.pictures import ENDINGS, Pictures
from vlm_distill_cache.data.benchmarks.question_rows import (
    SHORT_ANSWER,
    YES_OR_NO,
    Gathered,
    Row,
    edition,
    editions,
    file_named,
    id_of,
    picture_of,
    plain_path,
    probe,
    right_of,
    says_yes_or_no,
    scalars,
    text_of,
    verdict,
)
from vlm_distill_cache.data.images.load import ImageFile
from vlm_distill_cache.data.sample import ImageSource
from vlm_distill_cache.data.sources.pictures import says_none

POPE_SPLITS = ("random", "popular", "adversarial")
PERCEPTION = ("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR")
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
MME_TASKS = (*PERCEPTION, *COGNITION)
_TASK_OF = {task.lower(): task for task in MME_TASKS}
_SPLIT = re.compile(rf"(?<![a-z])({'|'.join(POPE_SPLITS)})(?![a-z])")
_FIGURE = ("category", "subcategory", "set_id", "figure_id")


def _is_pope(document: Document) -> bool:
    rows = probe(document)
    if document.has("text", "label") and not document.columns.isdisjoint(("image", "image_path")):
        return says_yes_or_no(rows, "label")
    if not document.has("question", "answer"):
        return False
    splits = {split for row in rows for split in _splits_told(row)}
    return (splits.issubset(POPE_SPLITS) if splits else document.has("image_source")) and says_yes_or_no(rows, "answer")


def _splits_told(row: Row) -> list[str]:
    """The splits that a row says it is of; VLMEvalKit's table names all that share a question."""
    return [word.strip().lower() for word in str(row.get("category") or "").split(",") if word.strip()]


def _split_of(document: Document) -> str:
    for part in reversed(PurePosixPath(document.shown.lower()).parts):
        if found := _SPLIT.search(part):
            return found[1]
    return ""


def _read_pope(documents: Sequence[Document], pictures: Pictures) -> list[Benchmark]:
    found = []
    for name, group in editions("pope", documents, _split_of, drop=_SPLIT):
        gathered = Gathered()
        for document in group:
            for index, row, where in gathered.rows(document):
                kind = ",".join(_splits_told(row)) or _split_of(document)
                own = f"{kind}/{id_of(row, index + 1)}".lstrip("/")
                gathered.take(own, where, partial(_pope_item, document, index, row, kind, pictures))
        notes = [
            "as POPE's own script has it, an answer without no or not is a yes; how many say neither is told beside it"
        ]
        found.append(gathered.benchmark(name, POPE, "pope", group, instruction=SHORT_ANSWER, notes=notes))
    return found


def _pope_item(document: Document, index: int, row: Row, kind: str, pictures: Pictures, item_id: str) -> YesNoItem:
    question = text_of(row, "text", "question")
    shown = row.get("image_source") or row.get("image_path") or file_named(document, row.get("image"))
    return YesNoItem(
        item_id=item_id,
        kind=kind,
        image=picture_of(document, index, row, pictures, ("image", "image_path")),
        question=question,
        right=right_of(row, "label" if "label" in row else "answer"),
        extra={"question_id": id_of(row, item_id), "question": question, "picture": str(shown or "")},
    )


def _is_mme(document: Document) -> bool:
    if _is_texts(document):
        return _are_texts_of_mme(document)
    if not document.has("question", "answer", "category"):
        return False
    rows = probe(document)
    return all(str(row.get("category")).lower() in _TASK_OF for row in rows) and says_yes_or_no(rows, "answer")


def _is_texts(document: Document) -> bool:
    return document.path.suffix.lower() == ".txt"


def _are_texts_of_mme(document: Document) -> bool:
    """Whether texts ask about the pictures that they are called as, or are called as MME's tasks, or their folder is."""
    if not document.has("question", "answer") or document.has("prediction"):
        return False
    if all(verdict(row.get("answer")) is None for row in probe(document)):
        return False
    called = {PurePosixPath(str(row["file"])).stem for row in probe(document)}
    if not {_task_folder(document).name.lower(), *map(str.lower, called)}.isdisjoint(_TASK_OF):
        return True
    return any(_picture_beside(document, name) for name in called)


def _names_pictures(document: Document) -> bool:
    """Whether lines name their picture, as the templates of MME's eval_tool; a text is called as its task then."""
    named = [row for row in probe(document) if row["image"] != PurePosixPath(str(row["file"])).stem]
    return any(PurePosixPath(str(row["image"])).suffix.lower() in ENDINGS for row in named)


def _read_mme(documents: Sequence[Document], pictures: Pictures) -> list[Benchmark | Unread]:
    texts = [document for document in documents if _is_texts(document)]
    templates = [document for document in texts if _names_pictures(document)]
    beside = [document for document in texts if document not in templates]
    found: list[Benchmark | Unread] = []
    if beside:
        why = f"it asks again what {beside[0].shown} and others beside the pictures ask"
        found += [Unread(document, why) for document in templates]
    roots: dict[str, list[Document]] = defaultdict(list)
    for document in beside or templates:
        roots[str(_task_folder(document).parent if beside else document.path.parent)].append(document)
    groups = [(edition(root, "mme"), group) for root, group in roots.items()]
    groups += [(edition(plain_path(document), "mme"), [document]) for document in documents if document not in texts]
    for label, group in groups:
        name = "mme" if len(groups) == 1 else f"mme-{label}".strip("-")
        gathered = Gathered()
        for document in group:
            _gather_mme(gathered, document, document in templates, pictures)
        pairs = Counter(item.group for item in gathered.items)
        odd = sum(count != 2 for count in pairs.values())
        notes = [f"{odd} of {len(pairs)} pictures have other than two questions, as MME has them"] if odd else []
        missing = sorted(set(MME_TASKS) - {item.kind for item in gathered.items})
        notes += [f"tasks of MME that are not there: {', '.join(missing)}"] if missing else []
        found.append(gathered.benchmark(name, MME, "mme", group, notes=notes))
    return found


def _task_folder(document: Document) -> PurePosixPath:
    folder = PurePosixPath(document.path.parent.resolve().as_posix())
    return folder.parent if folder.name.lower() == "questions_answers_yn" else folder


def _gather_mme(gathered: Gathered, document: Document, template: bool, pictures: Pictures) -> None:
    for index, row, where in gathered.rows(document):
        if _is_texts(document):
            task = PurePosixPath(str(row["file"])).stem if template else _task_folder(document).name
            shown = str(row["image"])
        else:
            task = str(row.get("category"))
            named = row.get("image_path") or row.get("question_id") or file_named(document, row.get("image"))
            shown = str(named or _row_with_picture(document, index, row))
        task = _TASK_OF.get(task.lower(), task)
        name = PurePosixPath(shown.replace("\\", "/")).name
        group = f"{task}/{name.rpartition('.')[0] if PurePosixPath(name).suffix.lower() in ENDINGS else name}"
        gathered.take(group, where, partial(_mme_item, document, index, row, task, group, name, pictures))


def _row_with_picture(document: Document, index: int, row: Row) -> Any:
    """What a table calls the row that holds the picture of another one, or of itself."""
    value = row.get("image")
    if isinstance(value, str) and len(value) <= LONGEST_INDEX and value.strip() in document.by_index:
        return value.strip()
    return row.get("index", index + 1)


def _mme_item(
    document: Document, index: int, row: Row, task: str, group: str, name: str, pictures: Pictures, item_id: str
) -> YesNoItem:
    if not _is_texts(document):
        image = picture_of(document, index, row, pictures, ("image", "image_path"))
    elif "answer" not in row:
        raise SampleError(f"expected a question, a tab, and Yes or No, got {str(row.get('text'))[:60]!r}")
    else:
        image = _picture_of_task(document, task, name, pictures)
    right, question = right_of(row, "answer"), text_of(row, "question")
    name = image.path.name if isinstance(image, ImageFile) else name
    return YesNoItem(
        item_id=item_id,
        kind=task,
        group=group,
        image=image,
        question=question,
        right=right,
        extra={
            "question_id": id_of(row, f"{task}/{name}"),  # as the hub and LLaVA's file have it
            "image": name,
            "question": question,
            "answer": "Yes" if right else "No",
        },
    )


def _picture_of_task(document: Document, task: str, name: str, pictures: Pictures) -> ImageSource:
    """The picture beside a text, in ``images`` beside its folder, or in a folder of its task somewhere else."""
    if path := _picture_beside(document, name):
        return ImageFile(path, shown=f"{task}/{path.name}")
    try:
        return pictures.find(f"{task}/{name}", near=document.path.parent)
    except SampleError:
        return pictures.find(f"{task}/images/{name}", near=document.path.parent)


def _picture_beside(document: Document, name: str) -> Path | None:
    folder = document.path.parent
    for place in (folder, folder / "images", folder.parent / "images"):
        for ending in ("", *sorted(ENDINGS), *(ending.upper() for ending in sorted(ENDINGS))):
            path = place / f"{name}{ending}"
            if path.suffix.lower() in ENDINGS and path.is_file():
                return path
    return None


def _is_hallusion(document: Document) -> bool:
    if document.has(*_FIGURE, "question_id", "question", "gt_answer"):
        return True
    if not document.has("index", "category", "l2-category", "question", "answer"):
        return False
    rows = probe(document)
    return {str(row.get("category")) for row in rows} <= {"VD", "VS"} and says_yes_or_no(rows, "answer")


def _read_hallusion(documents: Sequence[Document], pictures: Pictures) -> list[Benchmark]:
    groups: dict[tuple[str, str], list[Document]] = defaultdict(list)  # image and non_image are two tables of one
    for document in documents:
        groups[str(PurePosixPath(document.shown).parent), document.path.suffix.lower()].append(document)
    found = []
    for (folder, _), group in groups.items():
        gathered = Gathered()
        for document in group:
            for index, row, where in gathered.rows(document):
                told = _hallusion_told(row)
                own = "_".join(str(told.get(key)) for key in (*_FIGURE, "question_id"))
                gathered.take(own, where, partial(_hallusion_item, document, index, row, told, own, pictures))
        folder_name = PurePosixPath(folder).name.lower()
        name = "hallusionbench" if len(groups) == 1 or not folder_name else f"hallusionbench-{folder_name}"
        notes = ["answers are read as yes or no, no GPT judges them: one that is neither is wrong, an unsure one too"]
        found.append(gathered.benchmark(name, HALLUSION, "hallusionbench", group, instruction=YES_OR_NO, notes=notes))
    return found


def _hallusion_told(row: Row) -> dict[str, Any]:
    told = scalars(row, "image")
    if "subcategory" not in row:  # VLMEvalKit's table: the numbers end the index
        told |= dict(zip(("set_id", "figure_id", "question_id"), str(row.get("index")).split("_")[-3:], strict=False))
        told |= {"subcategory": row.get("l2-category"), "gt_answer": row.get("answer")}
    return told


def _hallusion_item(
    document: Document, index: int, row: Row, told: Row, own: str, pictures: Pictures, item_id: str
) -> YesNoItem:
    if any(says_none(told.get(key)) for key in (*_FIGURE, "question_id")):
        raise SampleError(f"it must have {', '.join(_FIGURE)} and question_id, got {own}")
    if item_id != own:
        raise SampleError(f"{own} is there already")
    blind = str(told.get("visual_input")) == "0"
    return YesNoItem(
        item_id=item_id,
        kind=str(told["category"]),
        group="_".join(str(told[key]) for key in _FIGURE[:3]),  # a pair is within a set, across its figures
        image=None if blind else _figure_of(document, index, row, told, pictures),
        question=text_of(row, "question"),
        right=right_of(told, "gt_answer"),
        extra=told,
    )


def _figure_of(document: Document, index: int, row: Row, told: Row, pictures: Pictures) -> ImageSource:
    image = picture_of(document, index, row, pictures, ("image", "filename", "image_path"))
    if isinstance(image, ImageFile):  # 0_0.png is another figure in each folder, and both VD and VS have a folder ocr
        above = [part.lower() for part in image.path.parts[-3:-1]]
        category, subcategory = str(told["category"]).lower(), str(told["subcategory"]).lower()
        if above[-1:] != [subcategory] or above[0] in {"vd", "vs"} - {category}:
            raise SampleError(
                f"no picture {image.name!r} in a folder {told['category']}/{told['subcategory']}; {image.path} is another one: "
                "put the folders of hallusion_bench.zip beside the questions, or name theirs with --images"
            )
    return image


POPE = Layout(
    name="pope",
    title="POPE",
    looks_for="rows of image, text and label (yes or no); or of question, answer (yes or no), image, and category (random, "
    "popular, adversarial) or image_source",
    source="https://github.com/AoiDragon/POPE, folder output; https://huggingface.co/datasets/lmms-lab/POPE; pictures of COCO "
    "val2014",
    licence="MIT; pictures as COCO says",
    scores="F1, accuracy, precision, recall and share of yes: mean of the splits, and each",
    recognises=_is_pope,
    read=_read_pope,
)
MME = Layout(
    name="mme",
    title="MME",
    looks_for="texts of a question, a tab, and Yes or No a line, called as their pictures, a folder a task; or rows of question, "
    "answer (yes or no), image, and category (one of MME's 14 tasks)",
    source="https://github.com/BradyFU/Awesome-Multimodal-Large-Language-Models, branch Evaluation; https://huggingface.co/datasets/lmms-lab/MME",
    licence="academic research alone; pictures as their sources say",
    scores="perception and cognition: sums over tasks of accuracy and acc+ in percent; each task; acc and acc+",
    recognises=_is_mme,
    read=_read_mme,
)
HALLUSION = Layout(
    name="hallusionbench",
    title="HallusionBench",
    looks_for="rows of category, subcategory, set_id, figure_id, question_id, question and gt_answer; or of index, category (VD "
    "or VS), l2-category, question and answer (yes or no)",
    source="https://github.com/tianyi-lab/HallusionBench; https://huggingface.co/datasets/lmms-lab/HallusionBench",
    licence="BSD-3-Clause",
    scores="aAcc, fAcc, qAcc, easy and hard pairs, without a GPT judge; each of VD and VS",
    recognises=_is_hallusion,
    read=_read_hallusion,
)
LAYOUTS: tuple[Layout, ...] = (HALLUSION, POPE, MME, *statements.LAYOUTS, *question_files.LAYOUTS)
