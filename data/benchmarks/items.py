"""What a published benchmark asks, whatever file it came in: four sorts of items, and the benchmark that holds them.

An item says what is shown, what is asked and what is right; how it is asked of a model, and how answers are counted, is
stage two's (`stage2_student.suite`). Pictures stay closed until they are asked about.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

from vlm_distill_cache.data.sample import ImageSource

_PICTURES = ("image", "images")
_LONGEST_KIND = 200  # characters


def short_kind(kind: str) -> str:
    """A subset's name, or the beginning of one that is no name; ends in a hash of it, so that two stay two."""
    if len(kind) <= _LONGEST_KIND:
        return kind
    return f"{kind[: _LONGEST_KIND - 12]}... {hashlib.sha256(kind.encode(errors='replace')).hexdigest()[:8]}"


@dataclass(frozen=True, kw_only=True)
class Item:
    """What all items have.

    Attributes:
        item_id: Unique within its benchmark; the published id where there is one.
        kind: The subset that scores are also told for (SugarCrepe's ``swap_obj``, MME's task); empty: none.
        group: Of items that are counted together (MME's picture, MMBench's rotations); empty: alone.
        extra: Further published fields that a metric needs; JSON.
    """

    item_id: str
    kind: str = ""
    group: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Cut a subset's name that no table can show."""
        object.__setattr__(self, "kind", short_kind(self.kind))

    @property
    def has_answer(self) -> bool:
        """Whether what is right is known, so that it is scored."""
        return getattr(self, "right", True) is not None and getattr(self, "answers", True) != ()


@dataclass(frozen=True, kw_only=True)
class CaptionItem(Item):
    """Pictures and captions, and which fit: SugarCrepe is one picture with two captions, Winoground two with two.

    ``fits`` has a row a picture and a column a caption.
    """

    images: tuple[ImageSource, ...]
    captions: tuple[str, ...]
    fits: tuple[tuple[bool, ...], ...]


@dataclass(frozen=True, kw_only=True)
class OpenItem(Item):
    """A question that is answered in words; ``answers`` are all that are right (VQAv2's ten), none: kept secret."""

    image: ImageSource | None
    question: str
    answers: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ChoiceItem(Item):
    """A question with options; ``right`` is the place of the right one, None: kept secret."""

    image: ImageSource | None
    question: str
    options: tuple[str, ...]
    right: int | None
    hint: str = ""


@dataclass(frozen=True, kw_only=True)
class YesNoItem(Item):
    """A question whose answer is yes or no; ``right`` is whether it is yes, None: kept secret."""

    image: ImageSource | None
    question: str
    right: bool | None


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """One published benchmark, or one split of it, as it lies in a folder.

    Attributes:
        name: Unique in its folder, a word without blanks: ``sugarcrepe``, ``vqav2``, ``mmbench-dev``.
        layout: Name of the `Layout` that read it.
        title: As its authors write it.
        items: All of one class.
        metric: Name of the metric (`stage2_student.suite.metrics`).
        instruction: What is appended to each question, as published evaluations do; empty: nothing.
        left_out: Of items that cannot be asked, by id: why.
        notes: What a reader of the scores must know: two pictures joined to one, answers kept secret.
        files: What it was read from, relative to the folder.
    """

    name: str
    layout: str
    title: str
    items: Sequence[Item]
    metric: str
    instruction: str = ""
    left_out: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()
    files: Sequence[str] = ()

    @cached_property
    def fingerprint(self) -> str:
        """Hash of ids, texts, right answers, metric and instruction; pictures are not opened for it."""
        found = hashlib.sha256(json.dumps([self.metric, self.instruction]).encode())
        for item in self.items:
            found.update(_told(item))
        return found.hexdigest()


def missing_kinds(what: str, published: Iterable[str], found: Iterable[str]) -> list[str]:
    """A note on the published subsets that are not there, if only some are: what is scored is the mean over the others."""
    there, published = set(found), list(published)
    missing = sorted(name for name in published if name not in there)
    if not missing or len(missing) == len(published):
        return []
    return [
        f"{len(missing)} of its {len(published)} {what} are not in the score, as they are not there: {', '.join(missing)}"
    ]


def item_digest(item: Item) -> str:
    """Hash of an item's id, texts and right answers, without its pictures: 16 hex digits."""
    return hashlib.sha256(_told(item)).hexdigest()[:16]


def _told(item: Item) -> bytes:
    told = {each.name: getattr(item, each.name) for each in fields(item) if each.name not in _PICTURES}
    return json.dumps(told, sort_keys=True, default=str).encode()
