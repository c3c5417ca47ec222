"""What a cache says of its samples in numbers, in words for people: pictures, unknown words, failures by reason.

Reasons are free text with ids, paths and numbers inside. Those that differ in nothing else are one reason.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from vlm_distill_cache.common.cache.schema import ONE_PICTURE
from vlm_distill_cache.common.cache.sidecar import ShardSidecar
from vlm_distill_cache.common.errors import DataError
from vlm_distill_cache.common.pixels import HASH_BYTES
from vlm_distill_cache.common.printing import brief, markdown_code, one_line

SHOWN_REASONS = 10
_MAX_GROUPS = 1000  # that are told apart
_ID_LENGTH = 80  # characters of a sample id that are shown
# What differs between samples that failed for one reason: what is quoted, paths, names of files, long words, digits.
_OWN = re.compile(
    r"""(?<!\w)(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|`[^`]*`)(?!\w)|\S*[/\\]\S*|\S+\.[A-Za-z]\w{1,7}\b|\S{40,}|\d+"""
)


def picture_words(pictures: int | None, samples: int, shown: int = 0) -> str:
    """How many samples have a picture; None: a part of the cache does not say.

    Args:
        shown: Pictures and frames of all samples, where they may have several; 0: they may not.
    """
    if pictures is None:
        return "with a picture: not recorded, as in caches of older versions"
    words = f"{pictures:,} of {samples:,} samples with a picture"
    return f"{words}, {shown:,} pictures and frames of videos in all" if shown else words


def shown_in(sidecar: ShardSidecar) -> int:
    """Pictures and frames of a shard's samples, where they may have several; else 0."""
    return 0 if sidecar.format_version == ONE_PICTURE else sidecar.field_bytes["image_hash"] // HASH_BYTES


def unknown_words(unknown: int | None, rows: int) -> str:
    """How many targets are words that the tokenizer lacks; None: a part of the cache does not say; empty if none is."""
    if unknown is None:
        return "words that the tokenizer lacks: not recorded, as in caches of older versions"
    share = 100 * unknown / max(1, rows)
    return f"{unknown:,} of {rows:,} targets ({share:.3g} %) are words that the tokenizer lacks" if unknown else ""


def divided_words(divided: int) -> str:
    """How many batches ran in parts; empty if none did."""
    batches = "1 batch" if divided == 1 else f"{divided:,} batches"
    return (
        f"{batches} ran in parts, for lack of memory: last bits may differ from those of another build"
        if divided
        else ""
    )


def kept_reason(reason: str) -> str:
    """A reason as a cache keeps it: at most 300 characters that print, on one line; long quotations are cut inside."""
    return brief(reason)


@dataclass
class _Group:
    """Samples that failed for one reason: their number, and the first of them."""

    sample_id: str
    reason: str
    count: int = 0


class FailureCounts:
    """Counts failures by reason.

    Attributes:
        total: All failures.
    """

    def __init__(self, failures: Iterable[tuple[str, str]] = ()) -> None:
        """Count these, ``(sample_id, reason)`` each."""
        self.total = 0
        self._groups: dict[str, _Group] = {}
        self.add(failures)

    def add(self, failures: Iterable[tuple[str, str]]) -> None:
        """Count more."""
        for sample_id, reason in failures:
            self.total += 1
            said = brief(reason).removeprefix(f"sample {sample_id!r}: ")  # which stands beside it
            own_name = rf"(?<!\w){re.escape(sample_id)}(?!\w)"
            form = _OWN.sub("*", re.sub(own_name, "*", said) if len(sample_id) > 1 else said)
            if form not in self._groups and len(self._groups) >= _MAX_GROUPS:
                form = ""
            self._groups.setdefault(form, _Group(sample_id, said)).count += 1

    def rows(self, *, limit: int = SHOWN_REASONS) -> list[tuple[int, str, str]]:
        """How many samples failed for a reason, the reason as the first of them has it, and its id; the commonest first."""
        groups = sorted(self._groups.values(), key=lambda group: -group.count)[:limit]
        return [(group.count, group.reason, one_line(group.sample_id, limit=_ID_LENGTH)) for group in groups]

    def more(self, *, limit: int = SHOWN_REASONS) -> str:
        """How many reasons `rows` leaves out, in words; empty if it has them all."""
        left = sorted((group.count for group in self._groups.values()), reverse=True)[limit:]
        return f"... and {len(left)} more reasons ({sum(left)} samples)" if left else ""

    def lines(self, *, limit: int = SHOWN_REASONS) -> list[str]:
        """A line for each reason, the commonest first, with an example; the last one says how many more there are."""
        shown = [
            f"{count} x, e.g. {sample_id}: {reason}" if count > 1 else f"{sample_id}: {reason}"
            for count, reason, sample_id in self.rows(limit=limit)
        ]
        return [*shown, *([more] if (more := self.more(limit=limit)) else [])]

    def card_section(self) -> str:
        """What a card says of the samples that could not be used; empty if there are none."""
        rows = "".join(
            f"| {count} | {markdown_code(why)} | {markdown_code(name)} |\n" for count, why, name in self.rows()
        )
        more = f"\n{self.more()}\n" if self.more() else ""
        table = f"| samples | reason | for example |\n|---|---|---|\n{rows}{more}"
        return f"\n## Samples that could not be used\n\n{table}" if rows else ""


@dataclass
class SampleCounts:
    """What the samples of a cache are, summed over its sidecars, one after the other: it may have millions.

    Attributes:
        pictures: Records with a picture; None: one of the shards does not say.
        shown: Their pictures and frames of videos, where samples may have several; else 0.
        unknown: Rows whose target is a word that the tokenizer lacks; None: one of the shards does not say.
        divided: Batches that ran in parts, for lack of memory.
    """

    shards: int = 0
    samples: int = 0
    rows: int = 0
    pictures: int | None = 0
    shown: int = 0
    unknown: int | None = 0
    divided: int = 0
    failures: FailureCounts = field(default_factory=FailureCounts)

    def add(self, sidecar: ShardSidecar) -> None:
        """Add a shard."""
        self.shards += 1
        self.samples += len(sidecar.sample_ids)
        self.rows += sidecar.rows
        self.pictures = _sum(self.pictures, sidecar.pictures)
        self.shown += shown_in(sidecar)
        self.unknown = _sum(self.unknown, None if sidecar.unknown is None else sidecar.unknown.rows)
        self.divided += sidecar.divided
        self.failures.add(sidecar.failed)

    def card_lines(self) -> str:
        """What a card lists of them."""
        words = unknown_words(self.unknown, self.rows)
        return (
            f"- Size: {self.samples} records, {self.rows} supervised rows; {self.failures.total} samples could not be used\n"
            f"- Pictures: {picture_words(self.pictures, self.samples, self.shown)}\n"
            + (f"- Unknown words: {words}\n" if words else "")
            + (f"- Memory: {divided}\n" if (divided := divided_words(self.divided)) else "")
        )


def _sum(total: int | None, more: int | None) -> int | None:
    return None if total is None or more is None else total + more


def nothing_usable(failures: Iterable[tuple[str, str]], *, where: object, remedy: str) -> DataError:
    """The error about a cache none of whose samples could be used: it would teach nothing, so it is not sealed."""
    counts = FailureCounts(failures)
    return DataError(
        f"{where}: none of its {counts.total} samples could be used, so there is nothing to seal:\n"
        + "\n".join(f"  {line}" for line in counts.lines())
        + f"\n{remedy}"
    )
