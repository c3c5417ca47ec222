"""How questions with options are counted, as published: by the letter that is answered, and by likelihood.

An item is asked once, or in as many turns as it has options, each of which begins with the next option (MMBench's circular
evaluation: all turns right). By likelihood: of the letters, after the same question; and of the options' texts, after the
question without options, their sum and their mean (``per_token``). Whatever has to win wins strictly: a tie is lost.
Dims: N options, T turns of an item.
"""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import cast

from vlm_distill_cache.data.benchmarks.items import ChoiceItem, Item
from vlm_distill_cache.data.sources.inline_options import LETTERS
from vlm_distill_cache.data.sources.options import ask_options, letter_place, plain_option
from vlm_distill_cache.stage2_student.suite.measures import Measure, mean_measure
from vlm_distill_cache.stage2_student.suite.requests import Generate, Metric, Request, Result, Weigh

ANSWER_TOKENS = 16  # of a letter with the option's text behind it
_WHOLE = re.compile(r"[\s\"'*_(\[]*([A-Za-z])[\s\"'*_)\].:,。]*")
_CLEAR = r"(?<![A-Za-z0-9_'’-]){}(?![A-Za-z0-9_'’-])"  # alone among Latin words; Chinese may stand beside it
# A and I are words where a word follows that joins no letters.
_LETTER = _CLEAR.format(r"[(\[]?(?:[B-HJ-Z]|[AI](?!\s+(?!(?:and|or|nor|to|through|is|as|because|since)\b)[a-z]))[)\]]?")
_LETTERS = rf"{_LETTER}(?:[\s,/&、;.]*(?:\b(?:and|or|nor|to|through)\b|和|或|与|及)?\s*{_LETTER})*"
_LEADING = re.compile(r"[\s\"'*]*(?:[(\[]([A-Z])[)\]]|([A-Z])\s*[).:])")
_LABELS = re.compile(r"(?<![A-Za-z0-9_'’.])([A-Z])[).:](?=\s)")  # of a text that repeats the options
_SEVERAL = re.compile(_LETTERS)
# What is called the answer; else an option, or what "it is".
_ANSWERED, _CHOSEN = (
    re.compile(
        rf"(?:\b(?i:{words})(?i:\s+is)?\s*[:-]?\s*\**\s*({_LETTERS}{more})"
        rf"|\b(?i:{words})(?i:\s+is)?\s*:?\s*\**\s*(\([a-z]\)|[a-z](?=[).:]|\W*\Z)))|{chinese}(?:是|为|选)?\s*:?\s*({_LETTERS})"
    )
    for words, more, chinese in (("answer|ans", "", "答案"), ("option|choice|letter", r"|[A-Z]\b(?!')", "选项"))
)
_IT_IS = re.compile(rf"\b(?i:it['’]s|it\s+is|I\s+(?:think|choose|pick|select))\s+({_LETTERS})")
_BRACKETED = re.compile(r"[(\[]([A-Z])[)\]]")
_LONE = re.compile(
    _CLEAR.format(
        r"(?:[B-HJ-Z]|[AI](?=\W*\Z|[\u4e00-\u9fff])|A(?=\s*[,;]|\s+(?:and|or|nor|is\s+(?:the|correct|right|best))\b))"
    )
)
_ABBREVIATED = re.compile(r"(?<![A-Za-z.])(?:[A-Z]\.){2,}[A-Z]?(?![A-Za-z])")  # U.S.A.
_NOT = r"(?:\b(?:not|never|neither|nor|cannot|except)\b|n['’]t\b|不是|并非|不选|不为|没有)"
_DENIED = re.compile(
    rf"{_NOT}\s*(?:(?:be|the|option|choice|answer)\s+)*{_LETTERS}"
    rf"|{_LETTER}\s*(?:\b(?:is|are)(?:\s+not\b|n['’]t\b|\s+(?:wrong|incorrect|false)\b)|不|是?错)"
)
_THAN = r"\b(?:at\s+(?:least|most)|(?:more|less|fewer|other|rather|greater|larger|smaller|higher|lower|better)\s+than|up\s+to)"
_DENYING = re.compile(rf"(?:{_NOT}|{_THAN})\s*(?:(?:an?|the|any)\s+)?\Z|\bno\s+\Z|不\Z")
# "No" that says that nothing can be told is no answer.
_BEHIND_NO = (
    r"(?!\s+(?:idea|clue|answer|option|choice|information|evidence|doubt|way\s+(?:to|of)|certainty|context)s?\b)"
)
_AMOUNT = re.compile(r"([-−]?)[$€£¥]?\s?(\d{1,3}(?:,\d{3})+|\d+)(\.\d+)?")


def parse_option(text: str, options: Sequence[str]) -> int | None:
    """Read which option an answer names, or None if there is not exactly one.

    Accepts ``B``, ``b``, ``(B)``, ``B. dog``, ``The answer is B.``, ``dog``, and a text in which one letter, or one option's
    text, stands; what is called the answer counts before other letters. Refuses ``A cat`` where no option says that (an
    article), letters beyond the options, what is denied (``not B``), and texts that name several. Letters inside an option's
    text (``vitamin C``) are no letters, and a number is a whole one (``2`` is not in ``2.5``).

    Source:
        As VLMEvalKit's `can_infer` (a letter alone among the words, else the one option whose text is in the answer),
        without its drawing of lots; but ``A`` is a letter only where it cannot be an article.
    """
    letters = LETTERS[: len(options)]
    text = unicodedata.normalize("NFKC", text.rpartition("</think>")[2])  # full-width letters and signs are as others
    options = [unicodedata.normalize("NFKC", option) for option in options]
    if whole := _WHOLE.fullmatch(text):
        return _only({whole[1].upper()}, letters)
    if (same := _only_text(text, options, lambda option, answer: option == answer)) is not None:
        return same
    amounts = [_amount(option) for option in options]
    if (said := _amount(text)) is not None and amounts.count(said) == 1:
        return amounts.index(said)
    if (place := letter_place(text, options)) is not None:  # with the option's text behind it
        return place
    bare = _ABBREVIATED.sub(" ", text.replace("__", " "))
    last = _WHOLE.fullmatch(bare.strip().rpartition("\n")[2])
    if last and len({*_LABELS.findall(bare)}) > 1:  # alone behind a list of the options
        return _only({last[1].upper()}, letters)
    for option in sorted(options, key=len, reverse=True):
        if len(option.strip()) > 1 and re.search(_CLEAR.format("[A-Z]"), option):
            bare = re.sub(re.escape(option.strip()), " _ ", bare, flags=re.IGNORECASE)
    bare = _DENIED.sub(" _ ", bare)
    named = [{each for parts in way.findall(bare) for each in "".join(parts).upper()} for way in (_ANSWERED, _CHOSEN)]
    leading = _LEADING.match(bare)
    told = {*_LABELS.findall(bare), *((leading[1] or leading[2],) if leading else ())}
    for several in _SEVERAL.findall(bare):
        both = {*re.findall("[A-Z]", several)}
        told |= both if len(both) > 1 else set()
    lone, thought = set(_LONE.findall(bare)), {*"".join(_IT_IS.findall(bare))}
    in_words = _only_text(text, options, _holds)
    for found in (*named, thought, told, set(_BRACKETED.findall(bare)), lone):
        if found := found & set(letters):
            place = _only(found, letters)
            first = in_words is not None and _starts(plain_option(options[in_words]), plain_option(text))
            return None if found == lone and first and in_words != place else place
    return in_words


def _only(found: set[str], letters: str) -> int | None:
    return letters.index(next(iter(found))) if len(found) == 1 and found <= set(letters) else None


def _only_text(text: str, options: Sequence[str], fits: Callable[[str, str], bool]) -> int | None:
    """The one option that fits a text; of several that do, the one that holds all others (``red`` in ``dark red``)."""
    plain = [plain_option(option) for option in options]
    found = [place for place, option in enumerate(plain) if fits(option, plain_option(text))]
    longest = [place for place in found if all(plain[other] in plain[place] for other in found)]
    return longest[0] if len(longest) == 1 else None


def _holds(option: str, answer: str) -> bool:
    """Whether an option stands in an answer as words of its own, or as a number of its own, and is not denied there."""
    if not option:
        return False
    if len(option) == 1 and not option.isascii():  # a Chinese character, which may be part of any word: at either end
        ends = option not in "是否" and answer.rstrip("。.!").endswith((f"是{option}", f":{option}"))
        return ends or _starts(option, answer)
    number = r"(?<![-−])(?<!\d[.,:/])", r"(?![.,:/-]?\d)"
    before = r"(?<![A-Za-z0-9_])" if option[0].isascii() else ""
    behind = r"(?![A-Za-z0-9_])" if option[-1].isascii() else ""
    before += number[0] if option[0].isdigit() else ""
    behind += number[1] if option[-1].isdigit() else _BEHIND_NO if option == "no" else ""
    places = re.finditer(before + re.escape(option) + behind, answer)
    return any(_DENYING.search(answer[: place.start()]) is None for place in places)


def _amount(text: str) -> float | None:
    """The number that a text is, whatever its currency: 1000 of ``$1,000``; None if it is more than a number."""
    found = _AMOUNT.fullmatch(text.strip().rstrip("."))
    if found is None:
        return None
    return float(found[2].replace(",", "") + (found[3] or "")) * (-1 if found[1] else 1)


def _starts(option: str, answer: str) -> bool:
    return re.match(re.escape(option) + r"(?![A-Za-z0-9_])", answer) is not None


@dataclass(frozen=True)
class _Turn:
    """One asking: the place of the right option, and those that were chosen; None: unparsed, or a tie."""

    right: int
    count: int
    said: int | None
    likely: int | None


@dataclass(frozen=True)
class _Counted:
    """An item whose answer is known, with what was answered."""

    item: ChoiceItem
    turns: Sequence[_Turn]
    options: int | None = None  # the likeliest by its text
    options_per_token: int | None = None

    @cached_property
    def kinds(self) -> Sequence[str]:
        """The subsets that it is of, one a level; empty: none."""
        return [self.item.kind, *self.item.extra.get("kinds", ())]

    @property
    def is_first(self) -> bool:
        """Whether it is the question as it was written, and no published rotation of one."""
        return bool(self.item.extra.get("turn", 0) == 0)


@dataclass(frozen=True, kw_only=True)
class ChoiceMetric:
    """Asks questions with options, and counts; ``circular``: also with the options rotated, unless items are rotations."""

    circular: bool = False

    def requests(self, item: Item, instruction: str) -> tuple[Request, ...]:
        """Each turn's answer and letters; then, of the question as it was written, the options' texts."""
        found = cast("ChoiceItem", item)
        letters = tuple(LETTERS[: len(found.options)])
        requests: list[Request] = []
        for turn in range(self._turns(found)):
            text = _prompt(found, turn, instruction)
            requests.append(Generate(image=found.image, question=text, max_tokens=ANSWER_TOKENS))
            requests.append(Weigh(image=found.image, question=text, answers=letters))
        if found.extra.get("turn", 0) == 0:
            question = "\n".join(part for part in (found.hint, found.question) if part)
            requests.append(Weigh(image=found.image, question=question, answers=found.options))
        return tuple(requests)

    def measures(self, items: Sequence[Item], results: Sequence[Sequence[Result]]) -> list[Measure]:
        """Count: circular accuracy where there are turns, accuracy, and the same by likelihood; each also by subset."""
        pairs = zip(cast("Sequence[ChoiceItem]", items), results, strict=True)
        counted = [self._count(item, result) for item, result in pairs if item.right is not None]
        first = [each for each in counted if each.is_first]
        found: list[Measure] = []
        if self.circular:
            groups = _complete(counted)
            found += _by_kind("circular", groups, _all_said, heading="all rotations right")
        as_asked = "accuracy as asked" if self.circular else ""
        found += _by_kind("accuracy", [[each] for each in first], _first_said, heading=as_asked)
        if self.circular:
            found += _by_kind(
                "circular_likelihood", groups, _all_likely, heading="all rotations right, by letters' likelihood"
            )
        found += _by_kind(
            "likelihood", [[each] for each in first], _first_likely, heading="accuracy by letters' likelihood"
        )
        units = [each.item.item_id for each in first]
        for name, chosen in (
            ("option_likelihood", [each.options for each in first]),
            ("option_likelihood_per_token", [each.options_per_token for each in first]),
        ):
            hits = [float(place == each.item.right) for place, each in zip(chosen, first, strict=True)]
            heading = "accuracy by options' likelihood" + (" per token" if name.endswith("token") else "")
            found += [mean_measure(name, units, hits, heading=heading)] if units else []
        return [*found, *_biases(counted), *_unparsed(counted)]

    def _turns(self, item: ChoiceItem) -> int:
        return len(item.options) if self.circular and not item.group else 1

    def _count(self, item: ChoiceItem, results: Sequence[Result]) -> _Counted:
        left = iter(results)
        right, count = cast("int", item.right), len(item.options)
        turns = []
        for turn in range(self._turns(item)):
            options = [*item.options[turn:], *item.options[:turn]]
            said = parse_option(str(next(left)), options)
            letters = cast("list[list[float]]", next(left))
            likely = _likeliest([nats for nats, _ in letters])
            turns.append(_Turn(right=(right - turn) % count, count=count, said=said, likely=likely))
        texts = cast("list[list[float]] | None", next(left, None))
        if texts is None:
            return _Counted(item, turns)
        return _Counted(
            item,
            turns,
            _likeliest([nats for nats, _ in texts]),
            _likeliest([nats / max(tokens, 1) for nats, tokens in texts]),
        )


def _prompt(item: ChoiceItem, turn: int, instruction: str) -> str:
    """The question in one turn: hint, question, options that begin with the ``turn``-th, instruction."""
    if turn == 0 and "asked" in item.extra:  # the options stand in the question, as it was published
        question = str(item.extra["asked"])
    else:
        question = ask_options(item.question, [*item.options[turn:], *item.options[:turn]])
    return "\n".join(part for part in (item.hint, question, instruction) if part)


def _likeliest(scores: Sequence[float]) -> int | None:
    best = max(scores)
    return scores.index(best) if scores.count(best) == 1 else None


def _complete(counted: Sequence[_Counted]) -> list[list[_Counted]]:
    """Questions with all their turns: an item alone, or the published rotations of one, none of them missing."""
    groups: dict[str, list[_Counted]] = defaultdict(list)
    for each in counted:
        groups[each.item.group or each.item.item_id].append(each)
    return [
        sorted(group, key=lambda each: each.item.extra.get("turn", 0))
        for group in groups.values()
        if len(group) == group[0].item.extra.get("turns", 1) and any(each.is_first for each in group)
    ]


def _all_said(group: Sequence[_Counted]) -> bool:
    return all(turn.said == turn.right for each in group for turn in each.turns)


def _all_likely(group: Sequence[_Counted]) -> bool:
    return all(turn.likely == turn.right for each in group for turn in each.turns)


def _first_said(group: Sequence[_Counted]) -> bool:
    return group[0].turns[0].said == group[0].turns[0].right


def _first_likely(group: Sequence[_Counted]) -> bool:
    return group[0].turns[0].likely == group[0].turns[0].right


def _by_kind(
    name: str,
    groups: Sequence[Sequence[_Counted]],
    is_right: Callable[[Sequence[_Counted]], bool],
    *,
    heading: str = "",
) -> Iterator[Measure]:
    """The share of groups that are right, of all and of each subset in the order in which these come.

    A name on two levels (MMBench's category and l2-category) is two subsets, unless they hold the same.
    """
    of_kind: dict[tuple[str, int], list[Sequence[_Counted]]] = {("", 0): list(groups)} if groups else {}
    for group in groups:
        for level, kind in enumerate(group[0].kinds):
            if kind:
                of_kind.setdefault((kind, level), []).append(group)
    lowest = dict(sorted(of_kind, reverse=True))
    for (kind, level), chosen in of_kind.items():
        first = lowest[kind]
        if level > first and chosen == of_kind[kind, first]:
            continue
        called = f"{kind} (level {level + 1})" if level > first else kind
        units = [group[0].item.group or group[0].item.item_id for group in chosen]
        hits = [float(is_right(group)) for group in chosen]
        yield mean_measure(f"{name}/{called}" if kind else name, units, hits, heading=called or heading)


def _by_question(counted: Sequence[_Counted]) -> Mapping[str, list[_Turn]]:
    """All turns of each question."""
    found: dict[str, list[_Turn]] = defaultdict(list)
    for each in counted:
        found[each.item.group or each.item.item_id] += each.turns
    return found


def _biases(counted: Sequence[_Counted]) -> Iterator[Measure]:
    """How much more often each letter is answered than it is right, of the questions that have it; 0 without bias.

    Answers that name no option tell nothing of a bias.
    """
    every = _by_question(counted)
    most = max((turn.count for each in every.values() for turn in each), default=0)
    turns = {unit: [turn for turn in each if turn.said is not None] for unit, each in every.items()}
    for place in range(most):
        having = {
            unit: [turn for turn in turns[unit] if place < turn.count]
            for unit, each in every.items()
            if any(place < turn.count for turn in each)
        }
        yield Measure(
            name=f"bias/{LETTERS[place]}" if place else "bias",
            units=list(having),
            hits=[
                sum(float(turn.said == place) - float(turn.right == place) for turn in each) for each in having.values()
            ],
            of=[float(len(each)) for each in having.values()],
            heading=f"bias to the letter {LETTERS[place]}",
            gains=None,
        )


def _unparsed(counted: Sequence[_Counted]) -> Iterator[Measure]:
    turns = _by_question(counted)
    if turns:
        yield Measure(
            name="unparsed",
            units=list(turns),
            hits=[float(sum(turn.said is None for turn in each)) for each in turns.values()],
            of=[float(len(each)) for each in turns.values()],
            heading="unparsed: no single option",
            gains=False,
        )


METRICS: Mapping[str, Metric] = {"choices": ChoiceMetric(), "circular": ChoiceMetric(circular=True)}
