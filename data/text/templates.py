"""Prompt templates as data: how turns become the one string a model was trained on.

A template also says *which characters are the answer*. The span begins with the blank after
"ASSISTANT:", because a tokenizer glues that blank to the first word (or makes it a token of its own),
and a prompt for generation ends before it: training and generation then agree on every token.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from vlm_distill_cache.common.errors import ConfigError, SampleError
from vlm_distill_cache.common.printing import brief
from vlm_distill_cache.data.sample import Turn
from vlm_distill_cache.data.text.chat import Marker, Rendered, asked_of, render_chat
from vlm_distill_cache.data.text.template_process import MAX_SOURCE, TemplateLimitError

IMAGE_MARKER = "<image>"

_OTHERS = "take another template (template=vicuna_v1), or a cache or checkpoint with a sound one"

_VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


@dataclass(frozen=True, kw_only=True)
class PromptTemplate:
    """Everything that decides the text; its dict is stored in the cache and fingerprinted.

    Attributes:
        name: Key in `TEMPLATES`, or ``chat``.
        system: Text in front of the first turn; a sample's own system prompt takes its place.
        before_question: Text in front of each question (and of the image).
        after_image: Text between a picture in front of a question and what follows it.
        before_answer: Text between question and the blank before the answer.
        blank: Separator before the answer; part of the answer span.
        answer_end: What ends an answer; None: the tokenizer's end-of-sequence token.
        drops_question: The question is left out (captioning).
        bos_after_image: The tokenizer's beginning-of-sequence token stands behind the image, or in front of a text
            without one, and a text holds one turn (PaliGemma: all in front of the answer is one prefix).
        chat_template: Jinja source; if not empty it makes the text and the fields above are unused.
        origin: Whose it is, for errors; no part of what is stored and compared.

    Raises:
        ConfigError: A field is of another type, or a text has more than `MAX_SOURCE` characters.
    """

    name: str
    system: str = ""
    before_question: str = "USER: "
    after_image: str = "\n"
    before_answer: str = " ASSISTANT:"
    blank: str = " "
    answer_end: str | None = None
    drops_question: bool = False
    chat_template: str = ""
    bos_after_image: bool = False
    origin: str = field(default="", compare=False, repr=False)

    def __post_init__(self) -> None:
        for known in fields(self):
            value = getattr(self, known.name)
            kind = bool if isinstance(known.default, bool) else str
            if not isinstance(value, kind) and not (known.name == "answer_end" and value is None):
                found, expected = type(value).__name__, kind.__name__
                raise ConfigError(f"{self._where}: its {known.name} is a {found}, expected {expected}; {_OTHERS}")
            if isinstance(value, str) and len(value) > MAX_SOURCE:
                raise ConfigError(
                    f"{self._where}: its {known.name} has {len(value)} characters, expected at most {MAX_SOURCE}; {_OTHERS}"
                )

    @property
    def _where(self) -> str:
        return f"the prompt template {brief(str(self.name), limit=40)!r}" + (
            f" of {self.origin}" if self.origin else ""
        )

    @property
    def holds_one_turn(self) -> bool:
        """Whether a conversation of several turns cannot be written."""
        return self.drops_question or self.bos_after_image

    def to_dict(self) -> dict[str, Any]:
        """The exact JSON stored in a cache's plan."""
        stored = asdict(self)
        del stored["origin"]
        if not self.bos_after_image:
            del stored["bos_after_image"]  # as plans had it before the setting
        return stored

    @classmethod
    def from_dict(cls, stored: dict[str, Any], *, origin: str = "a cache's plan") -> "PromptTemplate":
        """Inverse of `to_dict`; `ConfigError` if fields are unknown, missing or of another type."""
        try:
            return cls(**{**stored, "origin": origin})
        except TypeError as error:
            raise ConfigError(
                f"the prompt template of {origin} cannot be read: {error}; got {brief(str(stored))}; {_OTHERS}"
            ) from error

    def render(
        self,
        turns: Sequence[Turn],
        tokenizer: Any,
        *,
        has_image: bool = False,
        image_token: str = IMAGE_MARKER,
        markers: Sequence[Marker] | None = None,
        system: str = "",
    ) -> Rendered:
        """Write a conversation of at least one turn as text.

        Args:
            tokenizer: Gives the end-of-sequence token; the chat template is run by it.
            has_image: There is one picture.
            image_token: How it is written in the text.
            markers: How each picture and video is written, in order; None: as the two above say. They stand where the turns'
                `places` are, which are as many, or in front of the first question.
            system: The conversation's own system prompt; empty: the template's, if it has one.

        Raises:
            SampleError: A template for one turn is given a conversation of several, or one without a place for a system
                prompt is given one.
            ConfigError: The tokenizer lacks what the template needs, or its chat template fails on this conversation or
                writes it so that its answers cannot be located.
            TemplateLimitError: Its chat template takes more time or memory than any needs.
        """
        if markers is None:
            markers = (Marker(image_token),) if has_image else ()
        if self.chat_template:
            others = f"choose one of the templates {list(TEMPLATES)}"
            try:
                return render_chat(turns, tokenizer, self.chat_template, markers, system=system, remedy=others)
            except TemplateLimitError as error:
                raise TemplateLimitError(f"{self._where} {error}; {_OTHERS}") from error
        if system and not self.system:
            raise SampleError(
                f"prompt template {self.name!r} has no place for a system prompt, got {system[:60]!r}; take it out of the "
                "data, or use another template (template=vicuna_v1, or template=chat where the tokenizer has one)"
            )
        if self.holds_one_turn and len(turns) > 1:
            holds = "one caption" if self.drops_question else "one question and answer"
            raise SampleError(
                f"prompt template {self.name!r} holds {holds}, got a conversation of {len(turns)} turns; "
                "use another template for instruction data"
            )
        end = tokenizer.eos_token if self.answer_end is None else self.answer_end
        if end is None:
            raise ConfigError(
                f"prompt template {self.name!r} ends answers with the tokenizer's end-of-sequence token, "
                "but the tokenizer has none; set its eos_token"
            )
        bos = (tokenizer.bos_token or "") if self.bos_after_image else ""
        opening = f"{system.strip()} " if system else self.system  # as LLaVA puts it in place of its own
        text, spans = opening if markers else bos + opening, []
        behind_pictures = len(markers)
        for asked, turn in zip(asked_of(turns, markers), turns, strict=True):
            text += self.before_question
            leads = True
            for part in asked:
                if isinstance(part, str):
                    text += "" if self.drops_question else part
                    leads = False
                else:
                    behind_pictures -= 1
                    text += part.text + (bos if not behind_pictures else "") + (self.after_image if leads else "")
            text += self.before_answer
            start = len(text)
            text += self.blank + turn.answer.strip() + end
            spans.append((start, len(text)))
        return Rendered(text=text, answer_spans=tuple(spans))


TEMPLATES = {
    # LLaVA-1.5, MobileVLM and CompoDistill; the last differs in its tokenizer's end token only.
    "vicuna_v1": PromptTemplate(name="vicuna_v1", system=_VICUNA_SYSTEM + " "),
    # LLaVA's caption pre-training: image, caption, line feed.
    "plain": PromptTemplate(
        name="plain",
        before_question="",
        after_image="",
        before_answer="",
        blank="",
        answer_end="\n",
        drops_question=True,
    ),
    # PaliGemma: image, beginning of sequence, question, line feed, answer.
    "paligemma": PromptTemplate(
        name="paligemma",
        before_question="",
        after_image="",
        before_answer="\n",
        blank="",
        bos_after_image=True,
    ),
    # The built-in models: 35 tokens of system prompt would be most of their sequence.
    "short": PromptTemplate(name="short"),
}


def get_template(name: str, tokenizer: Any = None) -> PromptTemplate:
    """Look a template up by its key in `TEMPLATES`; ``chat``, which alone needs the tokenizer, takes its own.

    Raises:
        ConfigError: Unknown name, or the tokenizer has no chat template.
    """
    if name in TEMPLATES:
        return TEMPLATES[name]
    if name != "chat":
        raise ConfigError(f"unknown prompt template {name!r}; choose one of {[*TEMPLATES, 'chat']}")
    source = getattr(tokenizer, "chat_template", None)
    if not isinstance(source, str) or not source:
        raise ConfigError(
            f"prompt template 'chat' needs a tokenizer with one chat template, got {type(source).__name__}; "
            f"set tokenizer.chat_template or choose one of {list(TEMPLATES)}"
        )
    origin = str(getattr(tokenizer, "name_or_path", "")) or "the tokenizer"
    return PromptTemplate(name="chat", chat_template=source, origin=origin)
