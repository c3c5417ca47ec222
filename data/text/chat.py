"""A checkpoint's own chat template: the conversation as it writes it, and where the answers stand in it.

Most templates grow turn by turn, and what an answer adds to its prompt is the answer's span. Others write a conversation
anew with each turn: they take the reasoning out of earlier answers (Qwen 3, DeepSeek-R1, GLM), number the rounds, or
begin with a text that depends on all of it. Those are rendered once, whole, which is what the model will see, and a
second time with marks behind questions and answers: where taking the marks out gives the first text back, they say
where the answers end. Everything is checked, nothing guessed.
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import chain
from typing import Any

from vlm_distill_cache.common.errors import ConfigError, SampleError
from vlm_distill_cache.data.sample import Turn
from vlm_distill_cache.data.text.template_process import TemplateFailedError, TemplateSaysError, render_template

MAX_WORK = 200_000_000  # turns times characters: a conversation is rendered up to each of its turns

_MARKS = range(0xF0000, 0xFFFFE)  # characters of private use, which no text needs


@dataclass(frozen=True, kw_only=True)
class Rendered:
    """A conversation as text.

    Attributes:
        text: Holds the marker of each picture and video once, in order.
        answer_spans: Character ranges ``[start, end)`` of the answers, end-of-answer token included.
    """

    text: str
    answer_spans: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Marker:
    """What a template writes for a picture or a video: its text, and the type of its part of a message."""

    text: str
    kind: str = "image"


Asked = tuple[str | Marker, ...]
"""A question: its texts, and what it shows between them."""


def asked_of(turns: Sequence[Turn], markers: Sequence[Marker]) -> list[Asked]:
    """The questions of turns with markers at their places; without any places, in front of the first.

    Raises:
        SampleError: There are more places than markers, or fewer.
    """
    left = iter(markers)
    if not any(turn.places for turn in turns):
        return [(*(left if not number else ()), turn.question.strip()) for number, turn in enumerate(turns)]
    if sum(len(turn.places) for turn in turns) != len(markers):
        raise SampleError(
            f"its questions show {sum(len(turn.places) for turn in turns)} pictures and videos, but {len(markers)} are given"
        )
    return [tuple(next(left) if part is None else part for part in turn.parts()) for turn in turns]


def _with_mark(asked: Asked, mark: str) -> Asked:
    """A question with a text behind it."""
    return (*asked[:-1], asked[-1] + mark) if asked and isinstance(asked[-1], str) else (*asked, mark)


def render_chat(
    turns: Sequence[Turn], tokenizer: Any, source: str, markers: Sequence[Marker], *, remedy: str, system: str = ""
) -> Rendered:
    """Write a conversation by a chat template, and locate its answers.

    Where a template begins a stored answer with other white space than the prompt that asks for one
    (LLaVA-OneVision), the prompt's is taken: it is what the model sees when it answers. Where it writes nothing
    behind an answer (LLaVA-1.5, LLaVA-NeXT), the tokenizer's end-of-sequence token ends it, as in their training.
    Where it takes a part of an earlier answer away, what is left is that answer.

    Args:
        source: Jinja.
        markers: Of the pictures and videos that the questions show, in order.
        remedy: Ends the errors.
        system: The system prompt; empty: what the template writes without one.

    Raises:
        SampleError: The template fails on a system prompt, or leaves it out; or there are too many turns.
        ConfigError: The template fails on the conversation, or writes it so that its answers cannot be located.
        TemplateLimitError: The template takes more time or memory than any needs.
    """
    length = len(system) + sum(len(turn.question) + len(turn.answer) for turn in turns)
    if len(turns) * length > MAX_WORK:
        raise SampleError(
            f"{len(turns)} turns with {length} characters are too many for a chat template, which writes them once a turn; "
            "split the conversation, or leave the sample out"
        )
    variables = json.dumps(tokenizer.special_tokens_map, default=str)
    shown = dict.fromkeys(markers)
    asked = asked_of(turns, markers)
    parts = _content_form(source, variables, markers[0].text if markers else "")
    chat = _Chat(tokenizer, source, variables, tuple(shown), remedy, parts)
    if system:
        chat = _with_system(chat, system.strip(), len(turns))
    try:
        rendered = _grown(asked, turns, chat)
    except ConfigError:  # some parts of the conversation cannot be written by themselves
        rendered = None
    rendered = rendered or _whole(asked, turns, chat)
    for marker in shown:
        given, found = markers.count(marker), rendered.text.count(marker.text)
        if given != found:
            what = "one image" if given == 1 and marker.kind == "image" else f"{given} {marker.kind}s"
            raise ConfigError(
                f"the tokenizer's chat template writes {marker.text!r} {found} times for {what}; expected "
                f"{'once' if given == 1 else f'{given} times'}; {remedy}"
            )
    return rendered


@dataclass(frozen=True)
class _Chat:
    """A template with what it needs.

    Attributes:
        variables: What the template sees beside the messages: the tokenizer's special tokens by name, as JSON.
        shown: The markers that the conversation has.
        parts: Whether the contents of user and assistant are lists of parts, which vision templates iterate over; text-only
            ones concatenate strings.
        opening: The system prompt's message, if there is one.
    """

    tokenizer: Any
    source: str
    variables: str
    shown: tuple[Marker, ...]
    remedy: str
    parts: tuple[bool, bool]
    opening: tuple[dict[str, Any], ...] = ()

    def question(self, asked: Asked) -> dict[str, Any]:
        if self.parts[0]:
            content: Any = [
                {"type": "text", "text": part} if isinstance(part, str) else {"type": part.kind} for part in asked
            ]
            return {"role": "user", "content": content}
        # In front a picture has a line of its own, as LLaVA writes it; inside a text it stands where it is.
        leads = next((place for place, part in enumerate(asked) if isinstance(part, str)), len(asked))
        texts = [
            part if isinstance(part, str) else part.text + "\n" * (place < leads) for place, part in enumerate(asked)
        ]
        return {"role": "user", "content": "".join(texts)}

    def answer(self, text: str) -> dict[str, Any]:
        return {"role": "assistant", "content": [{"type": "text", "text": text}] if self.parts[1] else text}

    def opened(self, system: str, *, as_parts: bool) -> "_Chat":
        """The same with a system prompt."""
        content: Any = [{"type": "text", "text": system}] if as_parts else system
        return replace(self, opening=({"role": "system", "content": content},))

    def messages(self, pairs: Iterable[tuple[Asked, str]]) -> list[dict[str, Any]]:
        turns = ((self.question(asked), self.answer(answer)) for asked, answer in pairs)
        return [*self.opening, *chain.from_iterable(turns)]

    def plain(self, turns: int) -> list[dict[str, Any]]:
        """The messages of short turns, the first of which shows what the conversation does, once."""
        return self.messages(((*(self.shown if not turn else ()), "a"), "b") for turn in range(turns))

    def render(self, messages: list[dict[str, Any]], *, asks: bool = False) -> str:
        """The text; with ``asks`` up to where the next answer is to begin."""
        return next(self.beginnings(messages, [(len(messages), asks)]))

    def beginnings(self, messages: list[dict[str, Any]], wanted: list[tuple[int, bool]]) -> Iterator[str]:
        """The texts of the first so many messages, as `render` writes them."""
        try:
            yield from render_template(self.source, self.variables, messages, wanted)
        except TemplateFailedError as error:
            raise ConfigError(
                f"the tokenizer's chat template fails on this conversation: {error}; {self.remedy}"
            ) from error

    def end_token(self) -> str:
        """What ends an answer where the template writes nothing."""
        if self.tokenizer.eos_token is None:
            raise ConfigError(
                "the tokenizer's chat template writes nothing behind an answer and the tokenizer has no "
                f"end-of-sequence token; set its eos_token or {self.remedy}"
            )
        return str(self.tokenizer.eos_token)

    def ending(self, closing: str) -> str:
        """What of the text behind an answer the model writes itself: up to the first token that is no text.

        The line feed that many templates put behind it is not generated, nor is what some put at the very end of a
        conversation: the next answer's header (Llama 3's first template), a second end token (Phi 3).
        """
        return self.end_within(closing) or closing.rstrip()

    def end_within(self, text: str) -> str:
        """A text up to the first token that is no text; empty if there is none."""
        found = self._tokens.search(text)
        return text[: found.end()] if found else ""

    def behind(self, written: str, answer: str) -> str:
        """What stands behind an answer: behind its first place that a token which is no text follows, else its last."""
        places = [found.end() for found in re.finditer(re.escape(answer), written)]
        ended = [place for place in places if self._tokens.match(written[place:].lstrip())]
        return written[(ended[:1] or places[-1:])[0] :]

    @cached_property
    def _tokens(self) -> re.Pattern[str]:
        """Tokens such as ``<|im_end|>`` and ``</s>``; of those that are added for speed, as runs of blanks, none."""
        added = self.tokenizer.added_tokens_decoder.values()
        named = {str(token) for token in added if token.special or re.fullmatch(r"<\S+>|\[\S+\]", str(token))}
        named -= {*(marker.text for marker in self.shown), ""}
        return re.compile("|".join(re.escape(name) for name in sorted(named, key=len, reverse=True)) or r"(?!)")

    def not_located(self, turn: int, why: str) -> ConfigError:
        return ConfigError(
            f"the tokenizer's chat template does not grow turn by turn, and the answer of turn {turn + 1} cannot be "
            f"located in the whole conversation: {why}; {self.remedy}"
        )


def takes_parts(source: str, tokenizer: Any, image_token: str) -> bool:
    """Whether a chat template takes a user's content as a list of parts, and not as a text."""
    return _content_form(source, json.dumps(tokenizer.special_tokens_map, default=str), image_token)[0]


@lru_cache(maxsize=8)
def _content_form(source: str, variables: str, image_token: str) -> tuple[bool, bool]:
    """In which form a template takes the contents of user and assistant, by a plain conversation."""
    if "image" not in source:
        return False, False
    for parts in ((True, True), (True, False), (False, False)):
        chat = _Chat(None, source, variables, (Marker(image_token),) if image_token else (), "", parts)
        messages = chat.plain(1)
        try:
            text = chat.render(messages)
        except ConfigError:
            continue
        # A template that concatenates strings would write the list itself.
        if not any(str(message["content"]) in text for message in messages if not isinstance(message["content"], str)):
            return parts
    return True, True


def _with_system(chat: _Chat, system: str, turns: int) -> _Chat:
    """Put a system prompt in front, in the form of content in which the template writes it, begin and end."""
    free = _free_marks(iter([system]))
    marked = f"{next(free)}{system}{next(free)}"
    reason = "it leaves it out, or fails on it"
    for as_parts in (True, False) if chat.parts[0] else (False, True):
        probe = chat.opened(marked, as_parts=as_parts)
        try:
            text = probe.render(probe.plain(turns))
        except ConfigError as error:
            if isinstance(error.__cause__, TemplateSaysError):
                reason = f"it says: {error.__cause__}"
            continue
        if marked[0] in text and marked[-1] in text:
            return chat.opened(system, as_parts=as_parts)
    raise SampleError(
        f"the tokenizer's chat template takes no system prompt ({reason}), got {system[:60]!r}; take it out of the data, or "
        "put it into the first question"
    )


def _grown(asked: Sequence[Asked], turns: Sequence[Turn], chat: _Chat) -> Rendered | None:
    """Render turn by turn: what an answer adds to its prompt is the answer's span; None if it is not so."""
    messages = chat.messages(zip(asked, (turn.answer.strip() for turn in turns), strict=True))
    lead = len(chat.opening)
    ends = range(lead + 1, len(messages), 2)
    texts = chat.beginnings(messages, [pair for end in ends for pair in ((end, True), (end + 1, False))])
    spans: list[tuple[int, int]] = []
    text = past = ""  # ours, and as the template writes the same turns
    for end, prompt, full in zip(ends, texts, texts, strict=True):
        answer = turns[(end - lead) // 2].answer.strip()
        question = prompt if full.startswith(prompt) else chat.render(messages[:end])
        written = _answer_of(past, question, prompt, full, answer)
        if written is None:
            return None
        if written.rstrip().endswith(answer):
            written = written.rstrip() + chat.end_token()
        text += prompt[len(past) :]
        closing = chat.behind(written, answer)
        spans.append((len(text), len(text) + len(written) - len(closing) + len(chat.ending(closing))))
        text, past = text + written, full
    return Rendered(text=text, answer_spans=tuple(spans))


def _answer_of(past: str, asked: str, prompt: str, full: str, answer: str) -> str | None:
    """What stands behind a prompt when its answer is written; None if that cannot be told.

    Args:
        past: The earlier turns; all others go on from there.
        asked: With the question.
        prompt: With the question and the request for an answer.
        full: With the question and the answer.
    """
    if not prompt.startswith(past):
        return None
    if full.startswith(prompt):
        return full[len(prompt) :] if answer in full[len(prompt) :] else None
    if not (prompt.startswith(asked) and full.startswith(asked)):
        return None
    before, found, after = full[len(asked) :].partition(answer)
    return answer + after if found and before.split() == prompt[len(asked) :].split() else None


def _whole(asked: Sequence[Asked], turns: Sequence[Turn], chat: _Chat) -> Rendered:
    """Render the conversation once, and find its answers by a second text with marks in it."""
    pairs = [(question, turn.answer.strip()) for question, turn in zip(asked, turns, strict=True)]
    free = _free_marks(chain.from_iterable((turn.question, turn.answer) for turn in turns))
    marks = [(next(free), next(free)) for _ in pairs]  # behind each question, behind each answer
    text = chat.render(chat.messages(pairs))
    marked = chat.render(chat.messages((_with_mark(q, m), a + n) for (q, a), (m, n) in zip(pairs, marks, strict=True)))
    places = _places(marked, [mark for pair in marks for mark in pair])
    if places is None or _without(marked, marks) != text:
        raise chat.not_located(0, "it changes with what stands at the end of a question or an answer")
    # The same turns with nothing but a mark for an answer show what is written around it.
    bare = chat.messages((_with_mark(question, m), n) for (question, _), (m, n) in zip(pairs, marks, strict=True))
    around = chat.render(bare)
    lead = len(chat.opening)
    pieces: list[str] = []
    spans: list[tuple[int, int]] = []
    past = moved = 0
    for turn, ((_, answer), (questioned, answered)) in enumerate(zip(pairs, marks, strict=True)):
        question_end, answer_end = places[2 * turn : 2 * turn + 2]
        prompt = _behind(chat.render(bare[: lead + 2 * turn + 1], asks=True), questioned)
        written = _behind(around, questioned)
        if prompt is None or written is None or answered not in written:
            raise chat.not_located(turn, "it changes with what stands behind it")
        header = _header(prompt, written.partition(answered)[0])
        if header is None or not text.startswith(header, question_end):
            raise chat.not_located(turn, f"the prompt for it ends {prompt[-40:]!r}, behind the question it writes "
                                         f"{text[question_end : question_end + 80]!r}")  # fmt: skip
        start = question_end + len(header)
        # Its last character at least must be there: a template may take reasoning away, not the answer.
        if not text[start:answer_end].rstrip().endswith(answer[-1:]):
            raise chat.not_located(turn, f"nothing of it is written behind {text[:start][-40:]!r}")
        closing = chat.ending(_behind(chat.render(bare[: lead + 2 * turn + 2]), answered) or "")
        end = ""
        if not closing:
            end = chat.end_token()
            if text[answer_end:].lstrip().startswith(end):  # it is written between turns only
                closing, end = text[answer_end : text.index(end, answer_end) + len(end)], ""
        elif not text.startswith(closing, answer_end):  # the last answer ends otherwise than those before it (gpt-oss)
            until = places[2 * turn + 2] if turn + 1 < len(pairs) else len(text)
            closing = chat.end_within(text[answer_end:until]) or closing
        if not text.startswith(closing, answer_end):
            raise chat.not_located(turn, f"behind it stands {text[answer_end : answer_end + 40]!r}, not {closing!r}")
        stop = answer_end + len(closing)
        spans.append((start + moved, stop + moved + len(end)))
        pieces += [text[past:stop], end]
        past, moved = stop, moved + len(end)
    return Rendered(text="".join([*pieces, text[past:]]), answer_spans=tuple(spans))


def _free_marks(texts: Iterator[str]) -> Iterator[str]:
    """Characters that no text holds."""
    taken = set(chain.from_iterable(texts))
    return (mark for mark in map(chr, _MARKS) if mark not in taken)


def _places(marked: str, marks: Sequence[str]) -> list[int] | None:
    """Where marks stand in a text, counted without them; None if one is not there exactly once, or they are disordered."""
    places = [marked.find(mark) for mark in marks]
    if any(marked.count(mark) != 1 for mark in marks) or places != sorted(places):
        return None
    return [place - index for index, place in enumerate(places)]


def _behind(text: str, mark: str) -> str | None:
    """What stands behind a mark; None if it is not there."""
    _, found, behind = text.partition(mark)
    return behind if found else None


def _without(marked: str, marks: Sequence[tuple[str, str]]) -> str:
    return marked.translate(dict.fromkeys(map(ord, chain.from_iterable(marks))))


def _header(prompt: str, written: str) -> str | None:
    """What stands between a question and its answer, by the prompt's and the stored conversation's text.

    Where the stored one goes on (an empty block of reasoning), the rest is a part of what is answered; where the prompt
    does (it opens a block of reasoning), the stored one is what the model sees. None: they do not agree.
    """
    if written.startswith(prompt):
        return prompt
    opens_more = bool(written.strip()) and prompt.startswith(written.rstrip())
    return written if opens_more or prompt.split() == written.split() else None
