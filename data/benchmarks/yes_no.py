"""Questions answered by yes or no: POPE, MME, HallusionBench; statements and LLaVA's question files have files of their own."""

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import xxhash

from vlm_distill_cache.common.errors import SampleError
from vlm_distill_cache.data.benchmarks import question_files, statements
from vlm_distill_cache.data.benchmarks.documents import LONGEST_INDEX, Document
from vlm_distill_cache.data.benchmarks.items import Benchmark, Item, YesNoItem, missing_kinds
from vlm_distill_cache.data.benchmarks.layouts import Layout, Unread
from vlm_distill_cache.data.benchmarks.pictures import ENDINGS, Pictures
from vlm_distill_cache.data.benchmarks.question_rows import (
    SHORT_ANSWER,
    YES_NO,
    YES_OR_NO,
    Gathered,
    Row,
    edition,
    editions,
    file_named,
    id_of,
    most,
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
from vlm_distill_cache.data.sources.parquet_rows import StoredPicture
from vlm_distill_cache.data.sources.pictures import says_none

POPE_SPLITS = ("random", "popular", "adversarial")
PERCEPTION = ("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR")
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
MME_TASKS = (*PERCEPTION, *COGNITION)
_TASK_OF = {task.lower(): task for task in MME_TASKS}
_SPLIT = re.compile(rf"(?<![a-z])({'|'.join(POPE_SPLITS)})(?![a-z])")
_THERE = re.compile(r"\b(?:is|are|was|were)\s+there\b", re.IGNORECASE)
# A mark, or without one the verb in front of what is asked about, first in a sentence or a clause.
_QUESTION = re.compile(
    rf"[?\uff1f]|{_THERE.pattern}|\byes or no\b|"
    r"(?:^|[\n>,.:])\s*(?:(?:is|are|was|were|does|did|can|could|has)\s+"
    r"(?:the|an?|this|that|it|one|two|each|every|some|his|her|its|their|he|she)|"
    r"(?:are|were|do|did|can|could|have)\s+(?:you|we|they|these|those|any|all|both)|is any)\b",
    re.IGNORECASE,
)
_MME_ENDS = re.compile(r"\byes or no\b", re.IGNORECASE)
_COCO = re.compile(r"\d{12}")
_FIGURE = ("category", "subcategory", "set_id", "figure_id")


def _is_pope(document: Document) -> bool:
    rows = probe(document)
    if document.has("text", "label") and not document.columns.isdisjoint(("image", "image_path")):
        published = document.has("question_id") or most(rows, lambda row: _asks_for_things(row.get("text")))
        return published and says_yes_or_no(rows, "label", YES_NO) and _ask(rows, "text")
    if (
        not document.has("question", "answer")
        or not says_yes_or_no(rows, "answer", YES_NO)
        or not _ask(rows, "question")
    ):
        return False
    if any(map(_splits_told, rows)):
        return most(rows, lambda row: set(_splits_told(row)) <= set(POPE_SPLITS) and bool(_splits_told(row)))
    return most(rows, lambda row: bool(_COCO.search(str(row.get("image_source")))))


def _ask(rows: Sequence[Row], key: str) -> bool:
    """Whether the texts under a key are questions; a sentence with its label is other data, and so is an answer."""
    return most(rows, lambda row: _QUESTION.search(str(row.get(key))) is not None)


def _asks_for_things(text: Any) -> bool:
    """Whether a text asks as POPE does: whether there is something."""
    return _THERE.search(str(text)) is not None


def _told_by_keys(items: Sequence[Item], asks: str, as_published: re.Pattern[str]) -> list[str]:
    """A note where most questions are none that the authors of a benchmark publish."""
    alike = sum(as_published.search(item.question) is not None for item in items if isinstance(item, YesNoItem))
    return (
        [f"told by its keys alone, and may be other data: {asks}, most of these do not"]
        if 2 * alike < len(items)
        else []
    )


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
            "as POPE's own script has it, an answer without no or not is a yes; how many say neither is told beside it",
            *_told_by_keys(gathered.items, "POPE asks whether there is something", _THERE),
        ]
        told = [split for item in gathered.items for split in item.kind.split(",")]
        notes += missing_kinds("splits", POPE_SPLITS, told)
        found.append(gathered.benchmark(name, POPE, "pope", group, instruction=SHORT_ANSWER, notes=notes))
    return found


def _pope_item(document: Document, index: int, row: Row, kind: str, pictures: Pictures, item_id: str) -> YesNoItem:
    question = text_of(row, "text", "question")
    if not set(_splits_told(row)) <= set(POPE_SPLITS):
        raise SampleError(f"'category' must be of {', '.join(POPE_SPLITS)}, got {str(row.get('category'))[:60]!r}")
    image = row.get("image")
    shown = (
        row.get("image_source")
        or row.get("image_path")
        or (image if isinstance(image, int) else file_named(document, image))
    )
    return YesNoItem(
        item_id=item_id,
        kind=kind,
        image=picture_of(document, index, row, pictures, ("image", "image_path", "image_source")),
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
    of_mme = most(rows, lambda row: str(row.get("category")).lower() in _TASK_OF)
    return of_mme and says_yes_or_no(rows, "answer", YES_NO)


def _is_texts(document: Document) -> bool:
    return document.path.suffix.lower() == ".txt"


def _are_texts_of_mme(document: Document) -> bool:
    """Whether texts ask about the pictures that they are called as, or are called as MME's tasks, or their folder is."""
    if document.has("prediction") or not any(_ends_in_yes_or_no(row) for row in probe(document)):
        return False
    called = {PurePosixPath(str(row["file"])).stem for row in probe(document)}
    if not {_task_folder(document).name.lower(), *map(str.lower, called)}.isdisjoint(_TASK_OF):
        return True
    return any(_picture_beside(document, name) for name in called)


def _ends_in_yes_or_no(row: Row) -> bool:
    """Whether a line does; after blanks in place of the tab it does, too, and is refused."""
    return verdict(row.get("answer") or (str(row.get("text")).split() or [""])[-1]) is not None


def _names_pictures(document: Document) -> bool:
    """Whether lines name their picture, as the templates of MME's eval_tool; a text is called as its task then."""
    named = [row for row in probe(document) if row["image"] != PurePosixPath(str(row["file"])).stem]
    return any(PurePosixPath(str(row["image"])).suffix.lower() in ENDINGS for row in named)


def _read_mme(documents: Sequence[Document], pictures: Pictures) -> list[Benchmark | Unread]:
    tabless = [document for document in documents if _is_texts(document) and not document.has("question", "answer")]
    documents = [document for document in documents if document not in tabless]
    texts = [document for document in documents if _is_texts(document)]
    templates = [document for document in texts if _names_pictures(document)]
    beside = [document for document in texts if document not in templates]
    why = "its lines have no tab between the question and Yes or No, as MME's have; put one in place of the blanks"
    found: list[Benchmark | Unread] = [Unread(document, why) for document in tabless]
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
        _leave_out_other_tasks(gathered)
        pairs = Counter(item.group for item in gathered.items)
        odd = sum(count != 2 for count in pairs.values())
        if 2 not in gathered.times.values():
            why = "none of its pictures has two questions, as each of MME's has; question_id, image_path or image tells the picture"
            found += [Unread(document, why) for document in group]
            continue
        why = "have other than two questions that can be asked, and count nowhere: calculation.py takes pairs alone"
        notes = [f"{odd} of {len(pairs)} pictures {why}"] if odd else []
        notes += missing_kinds("tasks", MME_TASKS, [item.kind for item in gathered.items])
        if gathered.items and not {item.kind for item in gathered.items} & set(MME_TASKS):
            notes.append("its tasks are of MME's form, and none of MME's: acc and acc+ are no score of MME")
        notes += _told_by_keys(gathered.items, "MME's questions end in 'Please answer yes or no.'", _MME_ENDS)
        found.append(gathered.benchmark(name, MME, "mme", group, notes=notes))
    return found


def _leave_out_other_tasks(gathered: Gathered) -> None:
    """A folder beside those of MME's tasks is none of its tasks; folders that are all one's own are MME's form."""
    others = [item for item in gathered.items if item.kind not in MME_TASKS]
    if len(others) < len(gathered.items):
        gathered.items = [item for item in gathered.items if item.kind in MME_TASKS]
        gathered.left_out |= {item.item_id: f"{item.kind!r} is none of MME's {len(MME_TASKS)} tasks" for item in others}


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
            shown = str(named or _picture_told(document, index, row))
        task = _TASK_OF.get(task.lower(), task)
        name = PurePosixPath(shown.replace("\\", "/")).name
        group = f"{task}/{name.rpartition('.')[0] if PurePosixPath(name).suffix.lower() in ENDINGS else name}"
        gathered.take(group, where, partial(_mme_item, document, index, row, task, group, name, pictures))


def _picture_told(document: Document, index: int, row: Row) -> Any:
    """What tells a picture that has no name from others: its bytes, which a table repeats or has in the row named there."""
    value = row.get("image")
    if isinstance(value, str) and len(value) <= LONGEST_INDEX and value.strip() in document.by_index:
        value = document.rows[document.by_index[value.strip()]].get("image")
    with suppress(SampleError):
        told = value.get("bytes") if isinstance(value, Mapping) else value
        data = told.read() if isinstance(told, StoredPicture) else told.encode() if isinstance(told, str) else told
        if isinstance(data, bytes) and data:
            return xxhash.xxh3_64_hexdigest(data)
    return row.get("index", index + 1)


def _mme_item(
    document: Document, index: int, row: Row, task: str, group: str, name: str, pictures: Pictures, item_id: str
) -> YesNoItem:
    if not _is_texts(document):
        if task.lower() not in _TASK_OF:
            raise SampleError(f"'category' must be one of MME's {len(MME_TASKS)} tasks, got {task[:60]!r}")
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
        with suppress(SampleError):
            return pictures.find(f"{task}/images/{name}", near=document.path.parent)
        raise


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
    return most(rows, lambda row: str(row.get("category")) in ("VD", "VS")) and says_yes_or_no(rows, "answer")


def _read_hallusion(documents: Sequence[Document], pictures: Pictures) -> list[Benchmark | Unread]:
    groups: dict[tuple[str, str], list[Document]] = defaultdict(list)  # image and non_image are two tables of one
    found: list[Benchmark | Unread] = []
    for document in documents:
        if any(row.get("model_prediction") for row in probe(document)):
            why = "it holds a model's answers (model_prediction); the questions are HallusionBench.json"
            found.append(Unread(document, why))
            continue
        groups[str(PurePosixPath(document.shown).parent), document.path.suffix.lower()].append(document)
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
    named = ("image", "filename", "image_path")
    if all(says_none(row.get(key)) for key in named):  # their get_image_file_location goes by the numbers
        row = {"filename": f"{told['category']}/{told['subcategory']}/{told['set_id']}_{told['figure_id']}.png"}
    image = picture_of(document, index, row, pictures, named)
    # 0_0.png is another figure in each folder, and both VD and VS have a folder ocr; names with letters are one figure's
    if isinstance(image, ImageFile) and not any(map(str.isalpha, image.path.stem)):
        above = [part.lower() for part in image.path.parts[-3:-1]]
        category, subcategory = str(told["category"]).lower(), str(told["subcategory"]).lower()
        if above[-1:] != [subcategory] or above[0] in {"vd", "vs"} - {category}:
            raise SampleError(
                f"no picture {image.name!r} in a folder {told['category']}/{told['subcategory']}; {image.path} may be another one, "
                "as each folder has one of that name: put the folders of hallusion_bench.zip beside the questions, or name "
                "theirs with --images"
            )
    return image


POPE = Layout(
    name="pope",
    title="POPE",
    looks_for="rows of image, text (a question) and label (yes or no), with question_id or asking whether something is there; or "
    "of question, answer (yes or no), image, and category (random, popular, adversarial) or image_source (COCO's)",
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
    "answer (yes or no), image, and category (one of MME's 14 tasks), two of each picture",
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
