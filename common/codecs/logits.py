"""A teacher's next-token distribution in few bytes: the likely tokens by rank and the mass of all others.

A row keeps tokens until their probability falls below `floor`, at least `min_k` and at most `max_k`, and the
ground truth always (`common.codecs.live.select_entries`). In a Zarr shard a kept token takes about 1.8 bytes for its id
(u4; high bytes compress to little) and 0.35 for its gap to the most likely token, stored as a step from rank to rank. The
mass of all other tokens is computed from the dense logits, per temperature, so that top-k probabilities and tail mass are
consistent there: without it a cache is biased (relative squared gradient error at k=32: 0.0046 un-normalised, 0.0095
renormalised, 0.0003 with the tail).

Gaps are companded: half a step is 0.6 % of a probability near the top one and 7 % of one e^8 smaller, which
weighs that much less in the gradient. An infinite gap, a probability of exactly zero, has a code of its
own; only a ground truth that the teacher rules out needs it. What a row's gaps were rounded by in all is known from
the tail's mass, and decoding makes use of it (`balanced`).

Dims: A supervised rows, K most entries of a row, E entries of all rows.
"""

import functools
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Generic, Self

import numpy as np

from vlm_distill_cache.common.cache.document_rules import TEMPERATURES
from vlm_distill_cache.common.cache.schema import Field, Record
from vlm_distill_cache.common.codecs.description import (
    Codec,
    check_flag,
    check_whole_number,
    is_number,
    out_of_range,
    refuse_first,
    shown,
)
from vlm_distill_cache.common.codecs.quantise import (
    GAP_REACH,
    GAP_TABLE,
    ZERO_CODE,
    ArrayT,
    balance,
    encode_gaps,
    gap_codes,
    gap_steps,
)
from vlm_distill_cache.common.errors import CacheFormatError, ConfigError

MAX_ENTRIES = 255
"""Most entries of a row: `entry_count` is one byte."""

_COMPACT = {"gap_steps": True, "balanced": True}
LOGIT_PRESETS: dict[str, dict[str, Any]] = {
    "lean": {"floor": 1e-3, "min_k": 4, "max_k": 64, **_COMPACT},
    "default": {"floor": 3e-4, "min_k": 8, "max_k": 64, **_COMPACT},
    "wide": {"floor": 1e-4, "min_k": 8, "max_k": 64, **_COMPACT},
    "full": {"floor": 3e-5, "min_k": 8, "max_k": 255, **_COMPACT},
    "exact": {"floor": 0.0, "min_k": 1, "max_k": 255, "exact": True},
}
_FIXED = re.compile(r"fixed:([0-9]{1,4})")

_ROUNDING = 2e-3  # of a float16 near 1, twice over
_LEAST_TOP = -math.log(2**32) - 0.1  # ids are 32 bits, and the likeliest of n tokens has at least one n-th of the mass
_GAPS, _REACH = GAP_TABLE.astype(np.float64), GAP_REACH.astype(np.float64)
_REACH[0, ZERO_CODE - 1] = math.inf  # larger gaps share the code of the largest
_MASS_ERROR = 1e-3  # kept mass and tail may miss 1 by this beyond the rounding of gaps and of float16


def preset_settings(name: str) -> dict[str, Any]:
    """The codec settings of a preset.

    Args:
        name: One of `LOGIT_PRESETS`, or `fixed:K`: the K most likely tokens of every row. Such caches are nested:
            the first k entries of each row are the cache of `fixed:k` (`common.tools.select`).

    Raises:
        ConfigError: If there is no such preset; the message names those that exist.
    """
    if name in LOGIT_PRESETS:
        return dict(LOGIT_PRESETS[name])
    match = _FIXED.fullmatch(name) if isinstance(name, str) else None
    if match and 2 <= int(match[1]) <= MAX_ENTRIES:
        count = int(match[1])
        return {"floor": 0.0, "min_k": count, "max_k": count, **_COMPACT}
    raise ConfigError(
        f"logit preset: expected one of {sorted(LOGIT_PRESETS)} or 'fixed:K' with K from 2 to {MAX_ENTRIES} "
        f"(such as 'fixed:32'), got {name!r}"
    )


@dataclass(frozen=True)
class LogitRows(Generic[ArrayT]):
    """Distributions of some rows, as arrays (decoded) or tensors (`common.codecs.live.SparseLogits`).

    Attributes:
        token_ids: int64 `[A, K]`, most likely first (a ground truth of low rank last); padding is 0.
        log_probs: float32 `[A, K]`, nats at temperature 1; padding is -inf.
        entry_mask: bool `[A, K]`, True for the first entries of each row, False for padding.
        tail_log_mass: float32 `[A, len(temperatures)]`, nats: log-probability of all tokens not listed;
            -inf where there are none.
        temperatures: Temperatures of the columns of `tail_log_mass`; 1 is among them.
    """

    token_ids: ArrayT
    log_probs: ArrayT
    entry_mask: ArrayT
    tail_log_mass: ArrayT
    temperatures: tuple[float, ...]

    def __len__(self) -> int:
        """Number of rows, A."""
        return len(self.token_ids)  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class LogitCodec(Codec):
    """Which tokens of a row are kept, and how a record stores them.

    Round trip of `decode(encode(x))`, token ids and counts being exact: with `exact`, log-probabilities are
    within one unit in the last place and tails are equal. Otherwise the top log-probability and the tails
    are float16 (relative 2^-11, absolute 2^-25), and a gap to the top is within `gap_error(gap)`, or 2.1 times that
    if `balanced`.

    Attributes:
        floor: Probability (temperature 1) below which tokens are dropped, in [0, 1).
        min_k: Entries kept whatever their probability, at least 1.
        max_k: Most entries of a row, 2 to 255; a ground truth of lower rank replaces the last one.
        temperatures: From 0.01 to 1000, distinct; 1 is among them.
        exact: Store float32 instead of 8-bit gaps and float16.
        gap_steps: `log_gap` holds, of each entry but a row's first, the step of its 8-bit code from the entry
            before it, modulo 256: fewer bytes once compressed, the same values. Caches without the setting
            hold the codes themselves.
        balanced: Decoding uses that listed tokens and tail sum to one to undo part of the gaps' rounding: see
            `common.codecs.quantise.balance`. Caches without the setting decode as they always did.
    """

    floor: float
    min_k: int
    max_k: int
    temperatures: tuple[float, ...] = (1.0, 2.0)
    exact: bool = False
    gap_steps: bool = False
    balanced: bool = False

    signal: ClassVar[str] = "logits"
    of_image: ClassVar[bool] = False
    older: ClassVar[Mapping[str, Any]] = {"gap_steps": False, "balanced": False}
    infinite: ClassVar[Mapping[str, float]] = {"tail_logmass": -math.inf, "log_gap": math.inf}

    def __post_init__(self) -> None:
        check_whole_number("max_k", self.max_k, 2, MAX_ENTRIES)  # two: the top token and the ground truth
        check_whole_number("min_k", self.min_k, 1, self.max_k)
        check_flag("exact", self.exact)
        for name in ("gap_steps", "balanced"):
            check_flag(name, getattr(self, name))
            if self.exact and getattr(self, name):
                raise ConfigError(f"{name}: expected false with exact, whose gaps are numbers and not codes")
        if not is_number(self.floor) or not 0 <= self.floor < 1:
            raise ConfigError(f"floor: expected a probability in [0, 1), got {shown(self.floor)}")
        found = self.temperatures
        valid = isinstance(found, tuple) and all(
            is_number(t) and TEMPERATURES[0] <= t <= TEMPERATURES[1] for t in found
        )
        if not valid or len(set(found)) != len(found) or 1.0 not in found:
            raise ConfigError(
                f"temperatures: expected distinct numbers from {TEMPERATURES[0]} to {TEMPERATURES[1]} with 1 among them, got "
                f"{shown(found)}"
            )
        object.__setattr__(self, "floor", float(self.floor))
        object.__setattr__(self, "temperatures", tuple(float(t) for t in found))

    @classmethod
    def from_preset(cls, name: str, *, temperatures: tuple[float, ...] = (1.0, 2.0)) -> Self:
        """The codec of a preset of `preset_settings`, with exact tail masses at some temperatures."""
        return cls(**preset_settings(name), temperatures=temperatures)

    @property
    def preset(self) -> str | None:
        """The preset of these settings, whatever the temperatures; None: of none, as in older caches and parts of rows."""
        names = (*LOGIT_PRESETS, f"fixed:{self.max_k}")
        return next((name for name in names if self.from_preset(name, temperatures=self.temperatures) == self), None)

    def fields(self) -> tuple[Field, ...]:
        """Arrays of a record: three per row, two per entry."""
        real, gap = ("f4", "f4") if self.exact else ("f2", "u1")
        return (
            Field(name="entry_count", dtype="u1", axis="row"),
            Field(name="token_ids", dtype="u4", axis="entry"),
            Field(name="log_gap", dtype=gap, axis="entry"),
            Field(name="top_logprob", dtype=real, axis="row"),
            Field(name="tail_logmass", dtype=real, axis="row", trailing=(len(self.temperatures),)),
        )

    def encode(self, sparse: LogitRows[Any]) -> Record:
        """Pack rows of the codec's temperatures and at most `max_k` entries.

        Returns:
            `entry_count` u1 `[A]`, `token_ids` u4 `[E]`, `log_gap` u1 or f4 `[E]`, `top_logprob` f2 or f4
            `[A]` in nats, `tail_logmass` f2 or f4 `[A, temperatures]` in nats.
        """
        mask = np.asarray(sparse.entry_mask)  # [A, K]
        counts = np.count_nonzero(mask, axis=1)
        if sparse.temperatures != self.temperatures or counts.max(initial=1) > self.max_k:
            raise ValueError(
                f"encode: codec has max_k {self.max_k} and temperatures {self.temperatures}, rows have "
                f"{counts.max(initial=0)} entries and temperatures {sparse.temperatures}"
            )
        real = np.float32 if self.exact else np.float16
        where = _entry_positions(counts, mask.shape[1])
        log_probs = np.asarray(sparse.log_probs, np.float32)
        top = log_probs[:, 0] if len(log_probs) else np.zeros(0, np.float32)
        gaps = np.repeat(top, counts) - log_probs.reshape(-1)[where]
        codes = gaps if self.exact else encode_gaps(gaps)
        with np.errstate(over="ignore"):  # a log-mass below -65504 is a mass of zero
            tails = np.asarray(sparse.tail_log_mass, np.float32).astype(real)
        return {
            "entry_count": counts.astype(np.uint8),
            "token_ids": np.asarray(sparse.token_ids).reshape(-1)[where].astype(np.uint32),
            "log_gap": gap_steps(codes, counts) if self.gap_steps else codes,
            "top_logprob": top.astype(real),
            "tail_logmass": tails,
        }

    def decode(self, record: Record) -> LogitRows[np.ndarray]:
        """Unpack the rows of a record; the inverse of `encode` within the class's bounds."""
        counts = record["entry_count"].astype(np.int64)  # [A]
        entries = len(record["token_ids"])
        rows, total = len(counts), int(counts.sum())
        tails = record["tail_logmass"]
        fits = total == entries == len(record["log_gap"]) and counts.min(initial=1) >= 1
        if not fits or len(record["top_logprob"]) != rows or tails.shape != (rows, len(self.temperatures)):
            raise CacheFormatError(
                f"logits of a record: {rows} rows announce {total} entries, at least one each; found "
                f"{entries} ids, {len(record['log_gap'])} gaps, {len(record['top_logprob'])} tops and tails "
                f"{tails.shape}; the cache is damaged: run `cachectl verify`"
            )
        codes = self._codes(record, counts)
        refuse_first(self._impossible(record, counts, codes))
        width = int(counts.max(initial=0))
        where = _entry_positions(counts, width)
        ids = np.zeros(rows * width, np.int64)
        ids[where] = record["token_ids"]
        log_probs = np.full(rows * width, -np.inf, np.float32)
        gaps = codes if self.exact else GAP_TABLE[codes]
        listed = np.repeat(record["top_logprob"].astype(np.float32), counts) - gaps
        if self.balanced:
            kept = -np.expm1(tails[:, self.temperatures.index(1.0)].astype(np.float32))  # one less the tail's mass
            listed = balance(listed, codes, counts, kept)
        log_probs[where] = listed
        return LogitRows(
            ids.reshape(rows, width),
            log_probs.reshape(rows, width),
            np.arange(width) < counts[:, None],
            tails.astype(np.float32),
            self.temperatures,
        )

    def ranges(self, record: Record) -> Iterator[str]:
        """Yield log-probabilities above 0, entries out of order or twice in a row, and masses that cannot have been one."""
        counts = record["entry_count"].astype(np.int64)  # [A]
        whole = counts.min(initial=1) >= 1  # other rows are refused by `damage` and `decode`
        return self._impossible(record, counts, self._codes(record, counts) if whole else None)

    def _impossible(self, record: Record, counts: np.ndarray, codes: np.ndarray | None) -> Iterator[str]:
        """What `ranges` yields, of entries with these codes; None: only what can be said without them."""
        top, tail = record["top_logprob"], record["tail_logmass"]
        yield from out_of_range("top_logprob", top, _LEAST_TOP, _ROUNDING, said="log-probabilities of at most 0")
        yield from out_of_range("tail_logmass", tail, -math.inf, _ROUNDING, said="log-probabilities of at most 0")
        if not len(counts) or codes is None:
            return
        starts = np.cumsum(counts) - counts  # [A]
        gaps = codes if self.exact else GAP_TABLE[codes]
        rises = gaps[1:] >= gaps[:-1]  # not of NaN
        rises[starts[1:] - 1] = True
        if not (gaps[starts] == 0).all() or not rises.all():
            yield "log_gap is not 0 at the top token or falls with the rank; entries are stored by rank"
            return
        rows = np.repeat(np.arange(len(counts)) << 32, counts)
        pairs = np.sort(rows + record["token_ids"])  # int64: a row's number before its ids, which are below 2^32
        if (pairs[1:] == pairs[:-1]).any():
            yield "token_ids of a row repeat"
        yield from self._mass_damage(codes, counts, starts, record)
        # A tail of no mass at all has none at any temperature, but for what a low one makes too small to write.
        empty = np.isinf(tail[:, np.argsort(self.temperatures)])  # [A, T]
        if (empty[:, 1:] & ~empty[:, :-1]).any():
            yield "tail_logmass is infinite at a temperature, but finite at a lower one"

    def damage(self, record: Record) -> Iterator[str]:
        """Yield what `ranges` does, other numbers of entries than the codec keeps, and a missing ground truth."""
        yield from super().damage(record)
        counts = record["entry_count"].astype(np.int64)  # [A]
        if not len(counts):
            return
        if counts.min() < 1 or counts.max() > self.max_k:
            yield f"entry_count is {counts.min()} to {counts.max()}; the codec keeps 1 to {self.max_k}"
            return
        rows = np.repeat(np.arange(len(counts)), counts)  # [E]
        truth = record["token_ids"] == record["labels"][rows]
        if not np.bincount(rows[truth], minlength=len(counts)).all():
            yield "token_ids lack the ground truth of a row, which the codec always keeps"

    def _mass_damage(self, codes: np.ndarray, counts: np.ndarray, starts: np.ndarray, record: Record) -> Iterator[str]:
        """Check that kept tokens and tail can have summed to one before rounding, and the tail at each temperature with it."""
        top, tails = record["top_logprob"].astype(np.float64), record["tail_logmass"].astype(np.float64)
        tail = np.minimum(tails[:, self.temperatures.index(1.0)], 0)  # [A]
        others = np.exp(tail)
        least, largest = (np.exp(top) * mass for mass in self._masses(codes, starts, 1.0))
        allowed = np.full(len(top), _MASS_ERROR)
        if not self.exact:
            allowed += 2.0**-10 * (largest * np.abs(top) + others * np.abs(np.where(others > 0, tail, 0)))
        off = np.maximum(least + others - 1, 1 - largest - others)
        if (off > allowed).any():
            worst = (largest + others)[(off - allowed).argmax()]
            yield f"kept tokens and tail have a mass of {worst:.4f} together; expected 1"
            return
        some = np.isfinite(tail)  # [A]
        tail = np.where(some, tail, 0)
        # No token of the tail is likelier than the last entry but one: the last may be a ground truth of any rank.
        code = codes[starts + np.maximum(counts - 2, 0)]
        gap = code.astype(np.float64) if self.exact else np.where(counts > 2, _GAPS[code] - _REACH[1, code], 0)
        cap = np.minimum(top - gap, tail)
        tiniest = float(np.finfo(record["tail_logmass"].dtype).min)
        for column, temperature in enumerate(self.temperatures):
            if temperature == 1.0 or not some.any():
                continue
            power = 1 / temperature
            # Spread over all ids that there are, or in as few tokens as can be.
            ends = (1 - power) * math.log(2**32) + power * tail, tail + (power - 1) * cap
            kept = [power * top + np.log(mass) for mass in self._masses(codes, starts, power)]
            found = np.clip(tails[:, column], tiniest, -(2.0**-24))
            odds = found - np.log(-np.expm1(found))
            room = 0.02 + 2.0**-10 * (max(power, 1) * (np.abs(top) + np.abs(tail) + np.abs(cap)) + np.abs(found))
            low, high = np.minimum(*ends) - kept[1] - room, np.maximum(*ends) - kept[0] + room
            if (wrong := some & ~((low <= odds) & (odds <= high))).any():
                row = int(wrong.argmax())
                ends_of_row = [-math.log1p(math.exp(min(-end[row], 700.0))) for end in (low, high)]
                yield (
                    f"tail_logmass is {tails[row, column]:.4g} at temperature {temperature:g}; the row at temperature 1 says "
                    f"{ends_of_row[0]:.4g} to {ends_of_row[1]:.4g}"
                )

    def _masses(self, codes: np.ndarray, starts: np.ndarray, power: float) -> tuple[np.ndarray, np.ndarray]:
        """What each row's entries had together before rounding, at least and at most: float64 `[A]`, the top token's being 1.

        Args:
            power: That probabilities are taken to.
        """
        if self.exact:
            mass = np.add.reduceat(np.exp(-power * codes.astype(np.float64)), starts)
            return mass, mass
        low, high = (np.take(shares, codes) for shares in _shares(power))  # [E]
        low[starts] = high[starts] = 1.0  # nothing was rounded there
        return np.add.reduceat(low, starts), np.add.reduceat(high, starts)

    def _codes(self, record: Record, counts: np.ndarray) -> np.ndarray:
        """The code of each entry's gap, as an index of tables, or with `exact` the gap itself, `[E]`."""
        codes = gap_codes(record["log_gap"], counts) if self.gap_steps else record["log_gap"]
        return codes if self.exact else codes.astype(np.intp)


@functools.cache
def _shares(power: float) -> np.ndarray:
    """The mass of an entry by its gap's code, at least and at most, the top token's being 1: float64 `[2, 256]`.

    Args:
        power: That probabilities are taken to.
    """
    return np.exp(power * np.stack([-_GAPS - _REACH[0], _REACH[1] - _GAPS]))


def _entry_positions(counts: np.ndarray, width: int) -> np.ndarray:
    """Flat positions, in a row-major `[A, width]` array, of the first `counts[a]` entries of each row."""
    counts = counts.astype(np.int64)
    starts = np.cumsum(counts) - counts  # of each row among the entries
    shift = np.arange(len(counts), dtype=np.int64) * width - starts
    return np.repeat(shift, counts) + np.arange(int(counts.sum()), dtype=np.int64)


_VISUAL = "visual_"
_VISUAL_AXES = {"row": "visual", "entry": "visual_entry"}


@dataclass(frozen=True, kw_only=True)
class VisualLogitsCodec(LogitCodec):
    """How a record stores logits of visual rows; presets, bounds and settings are those of ``LogitCodec``.

    Stored once per image and prefix, like all that visual rows see.

    Source:
        LLaVA-KD (arXiv 2410.16236), section 3: distillation of visual tokens' output distributions.
    """

    signal: ClassVar[str] = "visual_logits"
    of_image: ClassVar[bool] = True
    infinite: ClassVar[Mapping[str, float]] = {_VISUAL + name: value for name, value in LogitCodec.infinite.items()}

    def fields(self) -> tuple[Field, ...]:
        """As ``LogitCodec.fields``, per visual token."""
        return tuple(
            replace(field, name=_VISUAL + field.name, axis=_VISUAL_AXES[field.axis]) for field in super().fields()
        )

    def encode(self, sparse: LogitRows[Any]) -> Record:
        """Pack rows ``[N]``; see ``LogitCodec.encode``."""
        return {_VISUAL + name: array for name, array in super().encode(sparse).items()}

    def decode(self, record: Record) -> LogitRows[np.ndarray]:
        """Unpack rows ``[N]``; see ``LogitCodec.decode``."""
        return super().decode(self._plain(record))

    def ranges(self, record: Record) -> Iterator[str]:
        """As ``LogitCodec.ranges``."""
        return super().ranges(record if "top_logprob" in record else self._plain(record))

    def damage(self, record: Record) -> Iterator[str]:
        """As ``LogitCodec.damage``; the likeliest token of a visual row stands for its ground truth."""
        plain = self._plain(record)
        counts, ids = plain["entry_count"].astype(np.int64), plain["token_ids"]
        starts = np.cumsum(counts) - counts
        inside = starts < len(ids)
        plain["labels"] = np.where(inside, ids[np.where(inside, starts, 0)], 0) if len(starts) else counts
        lines = super().damage(plain)
        yield from (f"visual_{line}" for line in lines)

    def _plain(self, record: Record) -> Record:
        """The arrays under the names that ``LogitCodec`` gives them."""
        return {field.name.removeprefix(_VISUAL): record[field.name] for field in self.fields()}
