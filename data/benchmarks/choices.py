"""Questions with options: MMBench, MMStar, SEED-Bench, AI2D, ScienceQA, and any rows that ask with options."""

import re
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from vlm_distill_cache.common.errors import DataError, SampleError
from vlm_distill_cache.data.benchmarks.choice_rows import IDS, Ask, Asked, Row, Source, ask_row, benchmarks_of
from vlm_distill_cache.data.benchmarks.documents import KEY, Document, readable
from vlm_distill_cache.data.benchmarks.items import Benchmark
from vlm_distill_cache.data.benchmarks.layouts import Layout, Unread
from vlm_distill_cache.data.benchmarks.pictures import Pictures
from vlm_distill_cache.data.benchmarks.vqa_files import is_multiple_choice
from vlm_distill_cache.data.sample import ImageSource
from vlm_distill_cache.data.sources.inline_options import split_options
from vlm_distill_cache.data.sources.options import letter_place, options_of, says_nothing
from vlm_distill_cache.data.sources.pictures import says_none

_PROBED = 8  # rows
_SCORES = "accuracy by letter; by likelihood of letters and of options; per category; bias to letters, unparsed"
_SUBJECTS = {"natural science": "NAT", "social science": "SOC", "language science": "LAN"}
_SAID = re.compile(r"answer(?:\s+is\s*|\s*:\s*)\(?([A-Z])\)?", re.IGNORECASE)


def _first(rows: Sequence[Row]) -> list[Row]:
    """The first rows, without those that cannot be read."""
    return list(islice(readable(rows), _PROBED))


def _listed(document: Document) -> Sequence[Row]:
    """The rows of a document: those under ``questions``, ``data`` or ``annotations`` of a JSON, or its own."""
    for key in ("questions", "data", "annotations") if isinstance(document.top, dict) else ():
        under = document.top.get(key)
        if isinstance(under, list) and under and all(isinstance(row, dict) for row in under):
            return under
    return document.rows


def _asks(row: Row) -> bool:
    """Whether a row asks with options of its own."""
    try:
        return isinstance(row.get("question"), str) and options_of(row) is not None
    except SampleError:
        return True  # which it says when it is read


def _asks_inline(row: Row) -> bool:
    """Whether a row's question holds its options, and its answer is one of their letters."""
    parts = split_options(row["question"]) if isinstance(row.get("question"), str) else None
    return parts is not None and (row.get("answer") is None or letter_place(row["answer"], parts[1]) is not None)


def _keys(document: Document) -> frozenset[str]:
    """Keys of the first rows, empty or not."""
    return frozenset(str(key) for row in _first(document.rows) for key in row)


def _is_mmbench(document: Document) -> bool:
    keys = _keys(document)
    return bool(keys & {"l2-category", "L2-category"}) and {"question", "A", "B"} <= keys and "E" not in keys


def _is_mmstar(document: Document) -> bool:
    keys = _keys(document)
    rows = _first(document.rows)
    return {"question", "answer", "l2_category"} <= keys and any(_asks(row) or _asks_inline(row) for row in rows)


def _is_seedbench(document: Document) -> bool:
    rows = _first(_listed(document))
    return any(
        {"question", "choice_a", "choice_b"} <= row.keys() and {"question_type_id", "data_id"} & row.keys()
        for row in rows
    )


def _is_ai2d(document: Document) -> bool:
    return bool(_diagrams(document)) or _ids_of(document) is not None or _is_ai2d_table(document)


def _is_ai2d_table(document: Document) -> bool:
    """Whether a table is lmms-lab's: four columns (and a name), stored pictures, and answers that are numbers as texts."""
    rows = _first(document.rows)
    numbers = all(isinstance(row.get("answer"), str) and row["answer"].isdigit() for row in rows)
    listed = all(isinstance(row.get("options"), list) and not isinstance(row.get("image"), str) for row in rows)
    return bool(rows) and _keys(document) - {*IDS} == {"question", "options", "answer", "image"} and numbers and listed


def _is_scienceqa(document: Document) -> bool:
    keys = _keys(document)
    return {"question", "choices", "answer", "subject", "grade"} <= keys or _splits(document) is not None


def _is_llava_scienceqa(document: Document) -> bool:
    rows = _first(document.rows)
    return bool(rows) and "id" in rows[0] and all(_exchange(row) is not None for row in rows)


def _is_options(document: Document) -> bool:
    rows = _first(_listed(document))
    if not rows or is_multiple_choice(document):
        return False
    return sum(map(_asks, rows)) * 2 >= len(rows) or all(map(_asks_inline, rows))


def _each_table(
    layout: str, title: str, ask: Ask = ask_row, *, metric: str = "choices", answers: str = "letters"
) -> Callable[..., Sequence[Benchmark | Unread]]:
    """A reader whose documents are benchmarks of their own."""

    def read(documents: Sequence[Document], pictures: Pictures) -> Sequence[Benchmark | Unread]:
        found: list[Benchmark | Unread] = []
        for document in documents:
            try:
                tables = [(document, _listed(document))]
                found += benchmarks_of(layout, title, tables, pictures, ask, metric=metric, answers=answers)
            except DataError as error:
                found.append(Unread(document, str(error)))
        return found

    return read


def _ask_mmstar(source: Source, row: Row) -> Asked:
    kinds = [str(row[key]) for key in ("category", "l2_category") if not says_nothing(row.get(key))]
    return ask_row(source, row, kinds=kinds)


def _read_seedbench(documents: Sequence[Document], pictures: Pictures) -> Sequence[Benchmark | Unread]:
    found: list[Benchmark | Unread] = []
    for document in documents:
        types = document.top.get("question_type") if isinstance(document.top, dict) else None
        names = {str(number): str(name) for name, number in types.items()} if isinstance(types, dict) else {}
        notes: list[str] = []

        def ask(source: Source, row: Row, names: Mapping[str, str] = names, notes: list[str] = notes) -> Asked:
            number = row.get("question_type_id")
            kinds = [names.get(str(number), f"type {number}")] if number is not None else []
            kinds += [str(row["question_image_type"])] if row.get("question_image_type") else []  # of SEED-Bench-2-Plus
            if isinstance(row.get("data_type"), str):
                kinds.append(row["data_type"])
            image = _seedbench_picture(source, row)
            frames = row.get("image")
            if row.get("data_type") == "video" and isinstance(frames, list) and len(frames) > 1:
                image = source.document.picture(source.index, "image", len(frames) // 2)
                notes[:] = ["of each video whose frames stand in its row, the middle one is asked about"]
            return ask_row(source, row, kinds=kinds, image=image)

        try:
            tables = [(document, _listed(document))]
            found += benchmarks_of("seedbench", "SEED-Bench", tables, pictures, ask, answers="letters", notes=notes)
        except DataError as error:
            found.append(Unread(document, str(error)))
    return found


def _seedbench_picture(source: Source, row: Row) -> ImageSource | None:
    """The picture that ``data_id`` names, where none stands in the row; of a video, a frame of that name."""
    if not says_none(row.get("image")):
        return None
    name = row.get("data_id")
    if isinstance(name, list) and len(name) == 1:
        name = name[0]
    if isinstance(name, list):
        raise SampleError(f"it is about {len(name)} pictures; only questions about one are asked")
    if not isinstance(name, str | int) or says_none(name):
        raise SampleError("it names no picture: neither 'image' nor 'data_id' holds one")
    try:
        return source.pictures.find(str(name), near=source.near, hints=("seed",))
    except SampleError:
        if row.get("data_type") != "video":
            raise
        bare = str(name).rpartition("/")[2].rpartition(".")[0] or str(name)
        try:
            return source.pictures.find(bare, near=source.near, hints=("seed",))
        except SampleError as error:
            raise SampleError(
                f"it is about the video {str(name)!r}, and there is no frame of that name; put its middle frame as "
                f"{bare}.png among the pictures to ask about that"
            ) from error


def _diagrams(document: Document) -> list[Mapping[str, Any]]:
    """AI2D's objects of a diagram and its questions: one a file, or several in a list or by name."""
    rows = [document.top] if isinstance(document.top, dict) and "questions" in document.top else document.rows
    return list(rows) if len(rows) and all(map(_is_diagram, _first(rows))) else []


def _is_diagram(entry: Mapping[str, Any]) -> bool:
    questions = entry.get("questions")
    return (
        isinstance(entry.get("imageName"), str)
        and isinstance(questions, dict)
        and all(isinstance(asked, dict) and "answerTexts" in asked for asked in questions.values())
    )


def _ids_of(document: Document) -> set[str] | None:
    """AI2D's list of test diagrams, a number a line; None of any other file."""
    if document.path.suffix.lower() != ".csv" or "test_ids" not in document.path.stem.lower():
        return None
    first, *numbers = document.path.read_text(encoding="utf-8-sig", errors="replace").split() or [""]
    found = {number.strip(',"') for number in (numbers if not first.strip(',"').isdigit() else [first, *numbers])}
    return found if found and all(map(str.isdigit, found)) else None


def _read_ai2d(documents: Sequence[Document], pictures: Pictures) -> Sequence[Benchmark | Unread]:
    lists = [(document, ids) for document in documents if (ids := _ids_of(document)) is not None]
    hub = [document for document in documents if _is_ai2d_table(document)]
    found = list(_each_table("ai2d", "AI2D", answers="numbers")(hub, pictures))
    diagrams = [document for document in documents if _diagrams(document)]
    if not diagrams:
        return [*found, *(Unread(document, "a list of test diagrams without the questions") for document, _ in lists)]
    tested = set().union(*(ids for _, ids in lists))
    tables = []
    for document in diagrams:
        rows = [
            {**asked, "question": question, "imageName": entry["imageName"]}
            for entry in _diagrams(document)
            if not tested or Path(entry["imageName"]).stem in tested
            for question, asked in entry["questions"].items()
        ]
        tables.append((document, rows))
    notes = [] if lists else ["all diagrams are asked about; ai2d_test_ids.csv beside them would tell the test part"]
    name = "ai2d-test" if lists else "ai2d"
    return [
        *found,
        *benchmarks_of("ai2d", "AI2D", tables, pictures, _ask_ai2d, name=name, notes=notes, answers="numbers"),
    ]


def _ask_ai2d(source: Source, row: Row) -> Asked:
    options = options_of({"options": row["answerTexts"]})
    by_letter = row.get("abcLabel") is True
    image = _ai2d_picture(source, row["imageName"], by_letter=by_letter)
    kinds = ["letters in the picture" if by_letter else "words"] if isinstance(row.get("abcLabel"), bool) else []
    return ask_row(source, row, options=options, answers=("correctAnswer",), kinds=kinds, image=image)


def _ai2d_picture(source: Source, name: str, *, by_letter: bool) -> ImageSource:
    """A diagram, or where letters are asked about its copy with letters in place of words, from ``abc_images``."""
    folder = "abc_images" if by_letter else "images"
    found = source.pictures.find(f"{folder}/{name}", near=source.near)
    lies_in = Path(getattr(found, "path", folder)).parent.name.lower()
    if (lies_in == "abc_images") != by_letter:
        raise SampleError(
            f"no picture {folder}/{name}, only one in a folder {lies_in!r}; AI2D keeps pictures with letters in place of words in "
            "abc_images, and all others in images"
        )
    return found


def _splits(document: Document) -> Mapping[str, Sequence[str]] | None:
    """ScienceQA's ``pid_splits.json``: lists of ids by split."""
    top = document.top
    if not isinstance(top, dict) or not {"train", "val", "test"} & top.keys():
        return None
    listed = [
        isinstance(ids, list) and all(isinstance(each, str) and each.isdigit() for each in ids) for ids in top.values()
    ]
    return top if all(listed) else None


def _read_scienceqa(documents: Sequence[Document], pictures: Pictures) -> Sequence[Benchmark | Unread]:
    splits = [(document, ids) for document in documents if (ids := _splits(document)) is not None]
    tables = [document for document in documents if _splits(document) is None]
    if not tables:
        return [Unread(document, "lists of ids by split without problems.json") for document, _ in splits]
    of_split = {name: split for _, ids in splits for split in ("train", "val", "test") for name in ids.get(split, ())}

    def split_of(row: Row) -> str:
        return of_split.get(str(row.get(KEY, ""))) or str(row.get("split") or "")

    def ask(source: Source, row: Row) -> Asked:
        return _ask_scienceqa(source, row, split_of(row))

    found: list[Benchmark | Unread] = []
    for document in tables:
        try:
            tables_of = [(document, document.rows)]
            found += benchmarks_of(
                "scienceqa", "ScienceQA", tables_of, pictures, ask, split_of=split_of, answers="numbers"
            )
        except DataError as error:
            found.append(Unread(document, str(error)))
    return found


def _ask_scienceqa(source: Source, row: Row, split: str) -> Asked:
    hint = "" if says_nothing(row.get("hint")) else str(row["hint"]).strip()
    name, image = str(row.get(KEY, "")), row.get("image")
    found = None
    if isinstance(image, str) and KEY in row:
        found = _problems_picture(source, [split, name, image])
    modality = [kind for kind, is_there in (("TXT", bool(hint)), ("IMG", not says_none(image))) if is_there] or ["NO"]
    subject = str(row.get("subject", ""))
    kinds = [_SUBJECTS.get(subject, subject), *modality]
    if (grade := re.search(r"\d+", str(row.get("grade", "")))) is not None:
        kinds.append("G1-6" if int(grade[0]) <= 6 else "G7-12")
    row = {key: value for key, value in row.items() if key not in ("lecture", "solution")}
    context = f"Context: {hint}" if hint else ""
    return ask_row(source, row, hint=context, kinds=kinds, image=found)


def _problems_picture(source: Source, parts: Sequence[str]) -> ImageSource:
    """ScienceQA's ``SPLIT/ID/image.png``: a picture of that name in another problem's folder is none."""
    found = source.pictures.find("/".join(part for part in parts if part), near=source.near)
    lies_in = Path(getattr(found, "path", "")).parent.name
    if lies_in != parts[1]:
        raise SampleError(
            f"no picture {'/'.join(parts)}; unpack ScienceQA's pictures so that each lies in a folder named by its problem"
        )
    return found


def _exchange(row: Row) -> tuple[str, str] | None:
    """What LLaVA's form of ScienceQA asks, and the letter of the right option; None if a row is of another kind."""
    said = row.get("conversations")
    if isinstance(said, list) and len(said) == 2 and all(isinstance(each, dict) for each in said):
        question, answer = said[0].get("value"), said[1].get("value")
    else:
        question, answer = row.get("instruction"), row.get("output")
    if not isinstance(question, str) or not isinstance(answer, str):
        return None
    parts = split_options(question.replace("<image>", ""))
    if parts is None:
        return None
    if letter_place(answer, parts[1]) is not None:
        return question, answer.strip()
    told = _SAID.findall(answer)
    return (question, told[-1].upper()) if told and letter_place(told[-1], parts[1]) is not None else None


def _ask_llava(source: Source, row: Row) -> Asked:
    exchange = _exchange(row)
    if exchange is None:
        raise SampleError("it is no question with options by letter, answered by one of them ('The answer is B.')")
    image = None
    name, file = str(row.get("id", "")), row.get("image")
    if isinstance(file, str):
        of_problem = file.startswith(f"{name}/")
        image = (
            _problems_picture(source, ["", name, file.rpartition("/")[2]])
            if of_problem
            else source.pictures.find(file, near=source.near)
        )
    context = re.search(r"Context:[ \t]*(\S[^\n]*)", exchange[0])
    modality = [
        kind
        for kind, is_there in (("TXT", context is not None and context[1].strip() != "N/A"), ("IMG", file is not None))
        if is_there
    ]
    entry = {"id": name, "question": exchange[0], "answer": exchange[1]}
    return ask_row(source, entry, kinds=modality or ["NO"], image=image, pictured=False)


LAYOUTS: tuple[Layout, ...] = (
    Layout(
        name="mmbench",
        title="MMBench",
        looks_for="question, A, B, ..., l2-category (or L2-category); image is base64, stored, "
        "a file, or another row's index; rotations have an index 1000000 k more, or g_index",
        source="https://github.com/open-compass/MMBench; https://huggingface.co/datasets/lmms-lab/MMBench",
        licence="Apache-2.0; pictures of their sources",
        scores="circular accuracy (all rotations right), accuracy as asked; the same by likelihood; per category; bias, unparsed",
        recognises=_is_mmbench,
        read=_each_table("mmbench", "MMBench", metric="circular"),
    ),
    Layout(
        name="mmstar",
        title="MMStar",
        looks_for="question (its options inside, or in A, B, ...), answer, category, l2_category",
        source="https://huggingface.co/datasets/Lin-Chen/MMStar",
        licence="none stated; drawn from six benchmarks",
        scores=_SCORES,
        recognises=_is_mmstar,
        read=_each_table("mmstar", "MMStar", _ask_mmstar),
    ),
    Layout(
        name="seedbench",
        title="SEED-Bench",
        looks_for="question, choice_a, choice_b, ..., with question_type_id or data_id; a list under questions, or rows",
        source="https://huggingface.co/datasets/AILab-CVC/SEED-Bench; https://huggingface.co/datasets/lmms-lab/SEED-Bench",
        licence="CC BY-NC 4.0; pictures of CC3M and of video sets",
        scores="accuracy by letter, over all, per type, of images and of videos (their frame); by likelihood; bias, unparsed",
        recognises=_is_seedbench,
        read=_read_seedbench,
    ),
    Layout(
        name="ai2d",
        title="AI2D",
        looks_for="imageName and questions by their text, each with answerTexts and correctAnswer; ai2d_test_ids.csv; or a table "
        "of question, options, answer (a number from 0, as a text) and image alone, or with an id",
        source="https://allenai.org/data/diagrams; https://huggingface.co/datasets/lmms-lab/ai2d",
        licence="CC BY-SA 4.0",
        scores=_SCORES,
        recognises=_is_ai2d,
        read=_read_ai2d,
    ),
    Layout(
        name="scienceqa",
        title="ScienceQA",
        looks_for="question, choices, answer (a number from 0), subject, grade, by id or as rows; pid_splits.json",
        source="https://github.com/lupantech/ScienceQA; https://huggingface.co/datasets/derek-thomas/ScienceQA",
        licence="CC BY-NC-SA 4.0",
        scores="accuracy by letter, by subject (NAT, SOC, LAN), context (TXT, IMG, NO) and grade; by likelihood; bias, unparsed",
        recognises=_is_scienceqa,
        read=_read_scienceqa,
    ),
    Layout(
        name="scienceqa-llava",
        title="ScienceQA as LLaVA has it",
        looks_for="id and conversations of one question with options by letter and its answer (or instruction and output)",
        source="https://github.com/haotian-liu/LLaVA (scripts/convert_sqa_to_llava.py)",
        licence="CC BY-NC-SA 4.0",
        scores=_SCORES,
        recognises=_is_llava_scienceqa,
        read=_each_table("scienceqa-llava", "ScienceQA", _ask_llava),
    ),
    Layout(
        name="options",
        title="Questions with options",
        looks_for="question with options (A, B, ...; choices, options: a list, by letter, or such a list as a text; option_a, ...; "
        "or inside the question), answer: a letter, a number or the option's text",
        source="your own; most tables of VLMEvalKit (https://github.com/open-compass/VLMEvalKit), MMMU, BLINK, A-OKVQA",
        licence="of each",
        scores=f"{_SCORES}; circular accuracy where the table has rotations",
        recognises=_is_options,
        read=_each_table("options", "Questions with options", answers=""),
    ),
)
