"""From rows that ask with options to items: pictures, rotations, which answer is right; shared by all such layouts."""

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import PurePosixPath
from typing import Any

from vlm_distill_cache.common.errors import DataError, SampleError
from vlm_distill_cache.data.benchmarks.documents import KEY, ODD_VALUES, Document, readable, without_part
from vlm_distill_cache.data.benchmarks.items import Benchmark, ChoiceItem, short_kind
from vlm_distill_cache.data.benchmarks.pictures import Pictures
from vlm_distill_cache.data.images.recognise import base64_picture
from vlm_distill_cache.data.sample import ImageSource, number_repeats
from vlm_distill_cache.data.sources.conversations import PASSAGES, as_text
from vlm_distill_cache.data.sources.inline_options import split_options
from vlm_distill_cache.data.sources.markers import take_markers
from vlm_distill_cache.data.sources.options import (
    INSTRUCTION,
    Options,
    letter_place,
    lists_options,
    number_place,
    options_of,
    says_nothing,
    text_place,
)
from vlm_distill_cache.data.sources.parquet_rows import StoredPicture
from vlm_distill_cache.data.sources.pictures import brief, named_pictures, refuse_unread, says_none

Row = Mapping[str, Any]
ROTATED = 1_000_000  # MMBench's rotation k of row i has the index i + k * ROTATED
SECRET = "its answers are kept secret: nothing is scored, answers.jsonl holds what was answered"
_NO_PICTURE = "none of its rows has a picture: its questions are asked as texts alone"
_INSTRUCTION_CN = "请直接回答选项字母。"  # LLaVA's, where questions are Chinese
_QUESTIONS = ("question", "query", "problem", "text")
_ANSWERS = (
    "answer",
    "answerKey",
    "answer_key",
    "label",
    "correct_answer",
    "correct_choice",
    "correct_option",
    "answer_index",
    "answer_idx",
    "correct_choice_idx",
    "gt_answer",
    "ground_truth",
    "target",
)
_FROM_ZERO = ("label", "answer_index", "answer_idx", "correct_choice_idx")  # by these names numbers are counted from 0
IDS = ("index", "question_id", "questionId", "qid", "id", "pid", "sample_id", "idx")
_CATEGORIES = (("l2-category", "L2-category", "l2_category"), ("category",))  # a subset's level, as its key is written
_PLAIN_WORDS = frozenset("data default questions annotations main problems".split())  # noqa: SIM905
_SPLITS = frozenset("train validation val dev test testmini".split())  # noqa: SIM905
_CHINESE = re.compile(r"[\u4e00-\u9fff]")


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a row asks, before its answer is understood.

    Attributes:
        item: Without the right answer.
        options: As the row has them.
        answer: As the row has it.
        named: The key that it stands under; empty: the row has none of these keys.
        shares: The ``index`` of another row whose picture is meant; empty: its own.
        turn: Of a published rotation: the row that it rotates; else empty.
        split: What it is of.
    """

    item: ChoiceItem
    options: Options
    answer: Any
    named: str = ""
    shares: str = ""
    turn: str = ""
    split: str = ""


@dataclass(frozen=True)
class Source:
    """Where a row stands, and how it may be read."""

    document: Document
    index: int
    pictures: Pictures

    @property
    def near(self) -> Any:
        """The folder of the annotations."""
        return self.document.path.parent


_LeftOut = dict[str, dict[str, str]]  # by split and item: why
Ask = Callable[[Source, Row], Asked]


def ask_row(
    source: Source,
    row: Row,
    *,
    question: str | None = None,
    options: Options | None = None,
    hint: str | None = None,
    kinds: Sequence[str] | None = None,
    answers: Sequence[str] = _ANSWERS,
    image: ImageSource | None = None,
    pictured: bool = True,
) -> Asked:
    """Read a row of the most usual keys; what a layout knows better is given.

    Args:
        image: Found already.
        pictured: Whether a picture is looked for where none is given.

    Raises:
        SampleError: It cannot be asked; says why.
    """
    question = _text_of(row, _QUESTIONS) if question is None else question
    question, files, count = take_markers(question)
    if count > 1 or files:
        raise SampleError(f"it is about {max(count, len(files))} pictures; only questions about one are asked")
    options = options_of(row) if options is None else options
    asked = ""
    inline = split_options(question) if options is None or lists_options(question, options.texts) else None
    if inline:
        asked, question = question, inline[0]
        options = options or Options(inline[1], "its question", lettered=True)
    if options is None or len(options.texts) < 2:
        raise SampleError(
            "it has no options: none under choices, options or A, B, ..., and none told by letters in its question"
        )
    for text in options.texts:
        if take_markers(text)[2]:
            raise SampleError(f"its options are pictures ({text[:60]!r}); only options that are texts are asked")
    hint = _hint_of(row) if hint is None else hint
    shares = ""
    if image is None and pictured:
        image, shares = _picture(source, row)
    levels = [[str(row[key]) for key in keys if not says_nothing(row.get(key))] for keys in _CATEGORIES]
    found = kinds if kinds is not None else [told[0] for told in levels if told]
    kinds = [short_kind(kind.strip()) for kind in found]
    extra: dict[str, Any] = {"kinds": kinds[1:]} if len(kinds) > 1 else {}
    if asked:
        extra["asked"] = asked
    name = next((_whole(row[key]) for key in (KEY, *IDS) if row.get(key) is not None), f"row-{source.index + 1}")
    if isinstance(name, int | str):  # a table of texts has numbers as texts
        is_number = isinstance(name, str) and name.isdigit() and name == _whole(row.get("index"))
        extra["question_id"] = int(name) if is_number else name
    item = ChoiceItem(
        item_id=str(name),
        kind=kinds[0] if kinds else "",
        image=image,
        question=question.strip(),
        options=options.texts,
        right=None,
        hint=hint,
        extra=extra,
    )
    filled = (key for key in answers if not says_nothing(row.get(key)))
    named = next(filled, next((key for key in answers if key in row), ""))
    answer = row.get(named)
    answer = None if says_nothing(answer) else answer
    if isinstance(answer, list | tuple) and len(answer) == 1:
        answer = answer[0]
    turn = row.get("g_index")
    return Asked(
        item=item,
        options=options,
        answer=answer,
        named=named,
        shares=shares,
        turn="" if says_nothing(turn) else str(_whole(turn)),
    )


def _whole(value: Any) -> Any:
    """A whole number that pandas wrote as a float (1000001.0), without its point; anything else as it is."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value.strip()[:-2] if isinstance(value, str) and re.fullmatch(r"\s*\d+\.0\s*", value) else value


def _split_of(row: Row) -> str:
    """The split that a row says it is of; empty if it does not."""
    split = row.get("split")
    return split.strip() if isinstance(split, str) else ""


def benchmarks_of(
    layout: str,
    title: str,
    tables: Sequence[tuple[Document, Sequence[Row]]],
    pictures: Pictures,
    ask: Ask = ask_row,
    *,
    metric: str = "choices",
    name: str = "",
    notes: Sequence[str] = (),
    split_of: Callable[[Row], str] = _split_of,
    answers: str = "",
) -> list[Benchmark]:
    """Benchmarks of rows, one a split where rows name several.

    Args:
        layout: Its name; a benchmark is called by it and by the first document's file.
        tables: Documents and their rows.
        ask: Reads a row.
        metric: How they are counted; published rotations are counted as such in any case.
        name: What the benchmark is called instead.
        split_of: Tells a row's split.
        answers: How answers are meant where they may be several things: ``letters`` or ``numbers``; empty: that is refused.

    Raises:
        DataError: What the answers mean cannot be told, or no row can be asked.
    """
    asked: list[Asked] = []
    left_out: _LeftOut = defaultdict(dict)
    read = [replace(document, rows=rows) for document, rows in tables]  # pictures in rows are read again from there
    for document, index in ((each, index) for each in read for index in range(len(each.rows))):
        split, called = "", f"{document.shown}, row {index + 1}"
        try:
            row = document.rows[index]
            split = split_of(row)
            called = f"{next((row[key] for key in (KEY, *IDS) if row.get(key) is not None), 'row')} ({called})"
            asked.append(replace(ask(Source(document, index, pictures), row), split=split))
        except (SampleError, *ODD_VALUES) as error:
            left_out[split][called] = str(error)
    names = number_repeats([each.item.item_id for each in asked])
    asked = [replace(each, item=replace(each.item, item_id=name)) for each, name in zip(asked, names, strict=True)]
    asked = _with_shared(asked, left_out)
    asked, first = _with_answers(asked, left_out, answers)
    asked, turned = _with_turns(asked, left_out)
    secret = SECRET
    if asked and not any(each.named for each in asked):
        keys = dict.fromkeys(str(key) for document in read for row in islice(readable(document.rows), 1) for key in row)
        secret = (
            f"no answers: none of {', '.join(_ANSWERS)} in its rows (these have {', '.join(keys)}); as where they are kept secret, "
            "nothing is scored, and answers.jsonl holds what was answered"
        )
    if first is not None and (first or not answers):
        notes = [*notes, f"its answers are numbers, counted from {first}"]
    by_split: dict[str, list[ChoiceItem]] = defaultdict(list)
    for each in asked:
        by_split[each.split].append(each.item)
    if not by_split:
        reasons = "; ".join(dict.fromkeys(why for each in left_out.values() for why in each.values()))
        raise DataError(f"none of its {sum(len(rows) for _, rows in tables)} questions can be asked: {reasons[:300]}")
    several = len({*by_split, *left_out}) > 1
    if several and (train := by_split.pop("train", None)):
        if not by_split:
            by_split["train"] = train
        else:
            notes = [*notes, f"{len(train)} questions of the split 'train' are not asked"]
    return [
        Benchmark(
            name="-".join(filter(None, (name, split)))
            if name
            else _called(layout, tables[0][0], split if several else ""),
            layout=layout,
            title=title,
            items=items,
            metric="circular" if turned else metric,
            instruction=_INSTRUCTION_CN if sum(map(_is_chinese, items)) > len(items) / 2 else INSTRUCTION,
            left_out=left_out[split],
            notes=[
                *notes,
                *([secret] if all(item.right is None for item in items) else []),
                *([_NO_PICTURE] if all(item.image is None for item in items) else []),
            ],
            files=[document.shown for document, _ in tables],
        )
        for split, items in by_split.items()
    ]


def _is_chinese(item: ChoiceItem) -> bool:
    return _CHINESE.search(item.question) is not None


def _text_of(row: Row, keys: Sequence[str]) -> str:
    found = next((row[key] for key in keys if not says_none(row.get(key))), None)
    if not isinstance(found, str):
        raise SampleError(f"it has no question: none of {', '.join(keys)} is a text, got {brief(found)}")
    return found


def _hint_of(row: Row) -> str:
    """What stands in front of the question: its hint, and the passage that it is about."""
    found = [(key, row[key]) for key in ("hint", *PASSAGES) if not says_nothing(row.get(key))]
    texts = [
        as_text(text, key).strip()
        for key, value in found
        for text in _each(value)
        if not isinstance(value, float | int)
    ]
    return "\n".join(dict.fromkeys(texts))


def _picture(source: Source, row: Row) -> tuple[ImageSource | None, str]:
    """The one picture of a row, or the index of the row that holds it; None where the row says that there is none.

    Raises:
        SampleError: There are several, or it is not there.
    """
    typed = frozenset(
        key for key, value in row.items() if any(isinstance(each, StoredPicture) for each in _each(value))
    )
    values = named_pictures(row, typed)
    if len(values) > 1:
        raise SampleError(f"it is about {len(values)} pictures; only questions about one are asked")
    if not values:
        number = row.get("image_id")
        if isinstance(number, int | str) and str(number).isdigit():  # of COCO
            return source.pictures.numbered(int(number), near=source.near), ""
        refuse_unread(row)
        return None, ""
    (value,) = values
    key, place = next(
        (key, None if held is value else place)
        for key, held in row.items()
        for place, each in enumerate(_each(held))
        if each is value
    )
    if not isinstance(value, str) or base64_picture(value) is not None:
        return source.document.picture(source.index, key, place), ""
    if str(_whole(value)).strip().isdigit() and "index" in row:
        return None, str(_whole(value)).strip()
    try:
        return source.pictures.find(value, near=source.near), ""
    except SampleError:
        if len(typed) != 1:
            raise
        return source.document.picture(source.index, next(iter(typed))), ""  # it stands in the row, too


def _each(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else [value]


def _with_shared(asked: Sequence[Asked], left_out: _LeftOut) -> list[Asked]:
    """Give the picture of another row to those that name its index."""
    holders = {_index(each): each.item.image for each in asked if not each.shares}
    found = []
    for each in asked:
        image = holders.get(each.shares) if each.shares else each.item.image
        if each.shares and image is None:
            left_out[each.split][each.item.item_id] = (
                f"its image is {each.shares!r}, the index of another row, and no row of that index has a picture"
            )
            continue
        found.append(replace(each, item=replace(each.item, image=image)))
    return found


def _with_turns(asked: Sequence[Asked], left_out: _LeftOut) -> tuple[list[Asked], bool]:
    """Put published rotations of one question together, the question first, and say whether there are any.

    A question has as many rotations as options; one that lacks some is left out, as nothing tells whether all are right.

    A row turns another where it says so (``g_index``), or where its index is the other's and a multiple of `ROTATED` more,
    and both have the same options.
    """
    by_id = {_index(each): each for each in asked}

    def base_of(each: Asked) -> str:
        """The index of the row that a row turns, or its own; empty if that row is not there."""
        name = _index(each)
        if each.turn or not name.isdigit() or int(name) < ROTATED:
            return each.turn or name
        first = by_id.get(str(int(name) % ROTATED))
        same = first is not None and sorted(first.item.options) == sorted(each.item.options)
        return "" if first is None else _index(first) if same else name

    bases = [base_of(each) for each in asked]
    if all(base in ("", _index(each)) for base, each in zip(bases, asked, strict=True)):
        return list(asked), False
    groups: dict[str, list[Asked]] = {}
    for base, each in zip(bases, asked, strict=True):
        groups.setdefault(base or str(int(_index(each)) % ROTATED), []).append(each)
    found = []
    for base, group in groups.items():
        group.sort(key=lambda each: (_index(each) != base, int(_index(each)) if _index(each).isdigit() else 0))
        options = group[0].item.options  # equal ones make equal rotations
        rotations = {(*options[turn:], *options[:turn]) for turn in range(len(options))}
        rotated = len({each.item.options for each in group}) == len(rotations)
        turns = len({_index(each) for each in group} if rotated else {each.item.options for each in group})
        if _index(group[0]) != base or not turns == len(group) == len(group[0].item.options):
            for each in group:
                left_out[each.split][each.item.item_id] = (
                    f"question {base} has {len(group[0].item.options)} options, and so as many rotations; {len(group)} rows of "
                    f"it can be asked, {turns} of them different"
                    + ("" if _index(group[0]) == base else f", and none has the index {base}")
                )
            continue
        for turn, each in enumerate(group):
            extra = {**each.item.extra, "turn": turn, "turns": len(group)}
            found.append(replace(each, item=replace(each.item, group=base, extra=extra)))
    return found, True


def _index(each: Asked) -> str:
    return str(each.item.extra.get("question_id"))


_Read = Callable[[Asked], int | None]
# How answers may be meant, the likeliest first.
_READINGS: Mapping[str, _Read] = {
    "letters": lambda each: None if each.options.commas else letter_place(each.answer, each.item.options),
    "numbers": lambda each: _number(each, each.options.first),
    "texts": lambda each: text_place(each.answer, each.item.options) if _may_be_text(each) else None,
    "numbers from 1": lambda each: _number(each, 1),
}


def _number(each: Asked, first: int) -> int | None:
    return None if each.options.commas else number_place(each.answer, each.item.options, first=first)


def _may_be_text(each: Asked) -> bool:
    if each.options.lettered and letter_place(each.answer, each.item.options) is not None:
        return False
    return isinstance(each.answer, str) or each.options.numbers


def _with_answers(asked: Sequence[Asked], left_out: _LeftOut, known: str) -> tuple[list[Asked], int | None]:
    """Find the right option of each row: answers of one file are all letters, or numbers (counted from what), or texts.

    Raises:
        DataError: They may be two of these, and mean something else.
    """
    asked = [each if not _is_minus(each.answer) else replace(each, answer=None) for each in asked]
    answered = [each for each in asked if each.answer is not None]
    read = {name: [place(each) for each in answered] for name, place in _READINGS.items()}
    counts = {name: sum(place is not None for place in places) for name, places in read.items()}
    best = max(counts, key=lambda name: (counts[name], name == known))  # the first of equals
    for name in ("numbers", "texts") if best != known else ():
        if counts[name] == counts[best] and name != best and read[name] != read[best] and counts[best]:
            raise DataError(
                f"its answers may be {best} or {name}, which mean different options; write letters as answers, and options "
                "that are no letters or numbers"
            )
    open_start = not any(each.options.first or each.named in _FROM_ZERO for each in answered) and len(answered) > 1
    if best == "numbers" != known and open_start and 0 not in read[best] and None not in read["numbers from 1"]:
        raise DataError(
            "its answers are numbers, and none is 0: they may be counted from 0 or from 1; write letters as answers, or call "
            "them answer_index where they are counted from 0"
        )
    meant = {id(each): place for each, place in zip(answered, read[best], strict=True)}
    found = []
    for each in asked:
        if each.answer is not None and meant[id(each)] is None:
            left_out[each.split][each.item.item_id] = (
                f"its answer {str(each.answer)[:60]!r} is none of its {len(each.item.options)} options (the answers of "
                f"this file are {best})"
            )
            continue
        found.append(replace(each, item=replace(each.item, right=meant.get(id(each)))))
    first = 1 if best == "numbers from 1" else answered[0].options.first if answered else 0
    return found, first if answered and best.startswith("numbers") else None


def _is_minus(answer: Any) -> bool:
    """Whether an answer is the number that tables of labels write for none."""
    return isinstance(answer, int) and not isinstance(answer, bool) and answer < 0


def _called(layout: str, document: Document, split: str) -> str:
    """A benchmark's name: its layout, and what the path of its file adds."""
    path = PurePosixPath(document.shown)
    words: list[str] = []
    for part in (*path.parts[:-1], without_part(path.name), split):
        words += [word for word in re.split(r"[^a-z0-9]+", part.lower()) if word and word not in _PLAIN_WORDS]
    named = "-".join(dict.fromkeys(words))
    if (layout == "options" and not _SPLITS.issuperset(words)) or named.replace("-", "").startswith(layout):
        return named
    return f"{layout}-{named}" if named else layout
