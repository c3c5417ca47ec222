"""The table of published layouts, and the search of a folder for them.

A layout is told by what its files hold, never by how they are called: names only help to tell splits and subsets apart.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from vlm_distill_cache.data.benchmarks.documents import Document
from vlm_distill_cache.data.benchmarks.items import Benchmark
from vlm_distill_cache.data.benchmarks.pictures import Pictures


@dataclass(frozen=True)
class Unread:
    """A document of a layout that makes no benchmark (answers without their questions), and why."""

    document: Document
    why: str


class Reader(Protocol):
    """From the documents that are a layout's to benchmarks."""

    def __call__(self, documents: Sequence[Document], pictures: Pictures) -> Sequence[Benchmark | Unread]:
        """Read what was recognised.

        Raises:
            DataError: They cannot be read; says where, and what was looked for.
        """
        ...


class Recognises(Protocol):
    """Whether a document is of a layout, by its keys and nesting; quick, opens no picture."""

    def __call__(self, document: Document) -> bool:
        """Look at keys and nesting."""
        ...


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One published layout.

    Attributes:
        name: A word: ``sugarcrepe``.
        title: As its authors write it.
        looks_for: Which keys and nesting it is told by, for errors and docs.
        source: Where its files come from.
        licence: Of its annotations, and of its pictures where that is another.
        scores: What is counted, the headline first, for docs: ``group, text and image score, by likelihood and P(yes)``.
        recognises: Whether a document is one of its files (annotations that belong to questions, too).
        read: Makes benchmarks of all documents of a folder that are of this layout.
    """

    name: str
    title: str
    looks_for: str
    source: str
    licence: str
    recognises: Recognises
    read: Reader
    scores: str = ""


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a folder holds.

    Attributes:
        benchmarks: Those that were read, by name.
        unread: Of files that look like data and are none, by path: why, and what was looked for.
    """

    benchmarks: Mapping[str, Benchmark]
    unread: Mapping[str, str]
