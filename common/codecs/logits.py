"""A teacher's next-token distribution in few bytes: the likely tokens by rank and the mass of all others.

A row keeps tokens until their probability falls below `floor`, at least `min_k` and at most `max_k`, and the
ground truth always. In a Zarr shard a kept token takes about 1.8 bytes for its id (u4; high bytes compress to little)
and 0.35 for its gap to the most likely token, stored as a step from rank to rank. The mass of all other tokens is
computed from the dense logits, per temperature, so that top-k probabilities and tail mass are consistent there:
without it a cache is biased (relative squared gradient error at k=32: 0.0046 un-normalised, 0.0095 renormalised,
0.0003 with the tail).

Gaps are companded: half a step is 0.6 % of a probability near the top one and 7 % of one e^8 smaller, which
weighs that much less in the gradient. An infinite gap, a probability of exactly zero, has a code of its
own; only a ground truth that the teacher rules out needs it. What a row's gaps were rounded by in all is known from
the tail's mass, and decoding makes use of it (`balanced`).

Dims: A supervised rows, V vocabulary, K most entries of a row, E entries of all rows.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from vlm_distill_cache.common.cache.schema import Field, Record
from vlm_distill_cache.common.codecs.description import (
    LOGIT_PRESETS,
    MAX_ENTRIES,
    check_flag,
    check_whole_number,
    codec_from_settings,
    codec_to_dict,
    preset_settings,
)
from vlm_distill_cache.common.codecs.quantise import GAP_TABLE, balance, encode_gaps, gap_codes, gap_steps
from vlm_distill_cache.common.errors import CacheFormatError, ConfigError, SampleError, TemperatureNotCachedError


@dataclass(frozen=True)
class SparseLogits:
    """A teacher's distribution on supervised rows, live or from a cache: losses cannot tell which.

    Attributes:
        token_ids: int64 `[A, K]`, most likely first (a ground truth of low rank last); padding is 0.
        log_probs: float32 `[A, K]`, nats at temperature 1; padding is -inf.
        entry_mask: bool `[A, K]`, True for the first entries of each row, False for padding.
        tail_log_mass: float32 `[A, len(temperatures)]`, nats: log-probability of all tokens not listed;
            -inf where there are none.
        temperatures: Temperatures of the columns of `tail_log_mass`; 1 is among them.
    """

    token_ids: Tensor
    log_probs: Tensor
    entry_mask: Tensor
    tail_log_mass: Tensor
    temperatures: tuple[float, ...]

    def __len__(self) -> int:
        """Number of rows, A."""
        return int(self.token_ids.shape[0])

    def at(self, temperature: float) -> tuple[Tensor, Tensor]:
        """The distribution at one of the cached temperatures.

        Args:
            temperature: Dimensionless; one of `temperatures`.

        Returns:
            Log-probabilities of the entries, float32 `[A, K]` in nats, padding -inf; log-mass of all other
            tokens, float32 `[A]`. Together they sum to 1.

        Raises:
            TemperatureNotCachedError: If the tail mass at `temperature` is not known.
        """
        if temperature not in self.temperatures:
            raise TemperatureNotCachedError(
                f"no tail mass at temperature {temperature}: the teacher's signals hold temperatures "
                f"{list(self.temperatures)}; use one of these, or rebuild the cache with "
                f"{temperature} among the temperatures of its logit codec"
            )
        tail = self.tail_log_mass[:, self.temperatures.index(temperature)]  # [A]
        if temperature == 1.0:
            return self.log_probs, tail
        scaled = self.log_probs / temperature
        kept = torch.log(-torch.expm1(tail))  # log of 1 - tail mass; exact at both ends
        normaliser = torch.logsumexp(scaled, dim=1) - kept
        return scaled - normaliser[:, None], tail

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "SparseLogits":
        """The same rows on another device."""
        return SparseLogits(
            self.token_ids.to(device, non_blocking=non_blocking),
            self.log_probs.to(device, non_blocking=non_blocking),
            self.entry_mask.to(device, non_blocking=non_blocking),
            self.tail_log_mass.to(device, non_blocking=non_blocking),
            self.temperatures,
        )

    @staticmethod
    def cat(parts: "list[SparseLogits]") -> "SparseLogits":
        """Rows of all parts in order, padded to the widest.

        Raises:
            ValueError: If there are no parts, or they differ in temperatures.
        """
        if not parts or any(part.temperatures != parts[0].temperatures for part in parts):
            found = sorted({part.temperatures for part in parts})
            raise ValueError(f"cat needs at least one part and equal temperatures, got {found}")
        width = max(part.token_ids.shape[1] for part in parts)

        def joined(name: str, fill: float) -> Tensor:
            tensors = [getattr(part, name) for part in parts]
            return torch.cat([_pad_columns(tensor, width, fill) for tensor in tensors])

        return SparseLogits(
            joined("token_ids", 0),
            joined("log_probs", -math.inf),
            joined("entry_mask", False),
            torch.cat([part.tail_log_mass for part in parts]),
            parts[0].temperatures,
        )


def _pad_columns(tensor: Tensor, width: int, fill: float) -> Tensor:
    if tensor.shape[1] == width:
        return tensor
    return torch.nn.functional.pad(tensor, (0, width - tensor.shape[1]), value=fill)


__all__ = ["LOGIT_PRESETS", "LogitCodec", "SparseLogits"]

_CHUNK_ELEMENTS = 2**24  # logits worked on at once: 64 MiB per float32 copy


@dataclass(frozen=True, kw_only=True)
class LogitCodec:
    """Which tokens of a row are kept, and how a record stores them.

    Round trip of `decode(encode(x))`, token ids and counts being exact: with `exact`, log-probabilities are
    within one unit in the last place and tails are equal. Otherwise the top log-probability and the tails
    are float16 (relative 2^-11, absolute 2^-25), and a gap to the top is within `gap_error(gap)`, or 2.1 times that
    if `balanced`.

    Attributes:
        floor: Probability (temperature 1) below which tokens are dropped, in [0, 1).
        min_k: Entries kept whatever their probability, at least 1.
        max_k: Most entries of a row, 2 to 255; a ground truth of lower rank replaces the last one.
        temperatures: Positive, distinct; 1 is among them.
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

    def __post_init__(self) -> None:
        check_whole_number("max_k", self.max_k, 2, MAX_ENTRIES)  # two: the top token and the ground truth
        check_whole_number("min_k", self.min_k, 1, self.max_k)
        check_flag("exact", self.exact)
        for name in ("gap_steps", "balanced"):
            check_flag(name, getattr(self, name))
            if self.exact and getattr(self, name):
                raise ConfigError(f"{name}: expected false with exact, whose gaps are numbers and not codes")
        if not isinstance(self.floor, int | float) or not 0 <= self.floor < 1:
            raise ConfigError(f"floor: expected a probability in [0, 1), got {self.floor!r}")
        valid = isinstance(self.temperatures, tuple) and all(
            isinstance(t, int | float) and math.isfinite(t) and t > 0 for t in self.temperatures
        )
        if not valid or len(set(self.temperatures)) != len(self.temperatures) or 1.0 not in self.temperatures:
            raise ConfigError(
                f"temperatures: expected distinct positive numbers with 1 among them, got {self.temperatures!r}"
            )
        object.__setattr__(self, "floor", float(self.floor))
        object.__setattr__(self, "temperatures", tuple(float(t) for t in self.temperatures))

    @classmethod
    def from_preset(cls, name: str, *, temperatures: tuple[float, ...] = (1.0, 2.0)) -> Self:
        """The codec of a named preset.

        Args:
            name: See `preset_settings`: a name of `LOGIT_PRESETS`, or `fixed:K`.
            temperatures: At which the tail mass is exact.

        Raises:
            ConfigError: If there is no such preset; the message names those that exist.
        """
        return cls(**preset_settings(name), temperatures=temperatures)

    def to_dict(self) -> dict[str, Any]:
        """The exact JSON stored in a cache's plan."""
        return codec_to_dict(self, self.signal)

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Self:
        """Rebuild the codec from `to_dict`; refuses anything else with a CacheFormatError."""
        older = {"gap_steps": False, "balanced": False}  # caches from before these settings
        return codec_from_settings(cls, cls.signal, {**older, **stored})

    def fields(self) -> tuple[Field, ...]:
        """Arrays of a record: three per row, two per entry."""
        real, gap = ("f4", "f4") if self.exact else ("f2", "u1")
        return (
            Field(name="entry_count", dtype="u1", axis="row", trailing=()),
            Field(name="token_ids", dtype="u4", axis="entry", trailing=()),
            Field(name="log_gap", dtype=gap, axis="entry", trailing=()),
            Field(name="top_logprob", dtype=real, axis="row", trailing=()),
            Field(name="tail_logmass", dtype=real, axis="row", trailing=(len(self.temperatures),)),
        )

    @torch.no_grad()
    def select(
        self, logits: Tensor, labels: Tensor, *, chunk_rows: int | None = None, checked: bool = True
    ) -> SparseLogits:
        """Keep the likely tokens of dense logits and measure the mass of the others.

        Works on the logits' device and in float32, a chunk of rows at a time: dense logits are
        never copied whole. Equal logits rank by lowest id, so that the result is a function of its input.

        Args:
            logits: Raw logits of supervised rows, float16, bfloat16 or float32 `[A, V]`; -inf allowed.
            labels: int64 `[A]`, the target token of each row.
            chunk_rows: Rows worked on at once; by default as many as hold 2^24 logits.
            checked: False: a row that is no distribution is not refused but comes back with a NaN as its first
                log-probability, and labels are checked only if they lie on the CPU. A GPU is then not waited for.

        Returns:
            Rows on the device of `logits`; on a GPU `max_k` wide, because a narrower width would have to be waited for.

        Raises:
            ValueError: If the shapes do not fit each other.
            SampleError: If a row has NaN or +inf, or no finite logit; or a label is not in the vocabulary.
        """
        if logits.ndim != 2 or labels.shape != logits.shape[:1]:
            raise ValueError(
                f"select: expected logits [A, V] and labels [A], got {[*logits.shape]} and {[*labels.shape]}"
            )
        rows, vocabulary = logits.shape
        verify = checked or labels.device.type == "cpu"
        if rows and verify and not bool(((labels >= 0) & (labels < vocabulary)).all()):
            bad = int(torch.nonzero((labels < 0) | (labels >= vocabulary))[0, 0])
            raise SampleError(
                f"row {bad} of {rows}: label {int(labels[bad])} is not in the teacher's vocabulary of "
                f"{vocabulary} tokens; the data must be encoded with the teacher's own tokenizer"
            )
        labels = labels.to(device=logits.device, dtype=torch.int64, non_blocking=True)
        step = chunk_rows or max(1, _CHUNK_ELEMENTS // vocabulary)
        parts = [
            self._select_chunk(logits[start : start + step], labels[start : start + step], start, checked=checked)
            for start in range(0, rows, step)
        ]
        if not parts:
            return self._empty(logits.device)
        return SparseLogits.cat(parts)

    def _select_chunk(self, logits: Tensor, labels: Tensor, first_row: int, *, checked: bool) -> SparseLogits:
        dense = logits.to(torch.float32, copy=True)  # [A, V]; masked in place below
        largest = dense.amax(dim=1, keepdim=True)  # [A, 1]
        if checked:
            _check_largest(largest[:, 0], dense, first_row)
        limit = min(self.max_k, dense.shape[1])
        on_cpu = dense.device.type == "cpu"  # nothing is waited for there
        values, ids = _top_by_lowest_id(dense, limit, find_ties=on_cpu)  # [A, limit]
        # Ranks are those of the logits as given; sums of large ones would lose their last digits.
        dense, values = dense.sub_(largest), values - largest
        normaliser = torch.logsumexp(dense, dim=1)  # [A], 0 to log V
        rank = torch.arange(limit, device=dense.device)

        # Tokens until p < floor, within min_k and max_k; probability zero is never listed for itself.
        likely = values - normaliser[:, None] >= (math.log(self.floor) if self.floor else -math.inf)
        finite = (values > -math.inf).sum(dim=1)
        count = likely.sum(dim=1).clamp(min=self.min_k).minimum(finite)  # [A]
        listed = ((ids == labels[:, None]) & (rank < count[:, None])).any(dim=1)
        slot = count.clamp(max=limit - 1)[:, None]  # where an unlisted ground truth goes
        label_values = dense.gather(1, labels[:, None])
        ids = ids.scatter(1, slot, torch.where(listed[:, None], ids.gather(1, slot), labels[:, None]))
        values = values.scatter(1, slot, torch.where(listed[:, None], values.gather(1, slot), label_values))
        count = torch.where(listed, count, slot[:, 0] + 1)

        width = int(count.max()) if on_cpu else limit
        mask = rank[:width] < count[:, None]  # [A, width]
        ids, values = ids[:, :width], values[:, :width].masked_fill(~mask, -math.inf)
        dense.scatter_(1, torch.where(mask, ids, ids[:, :1]), -math.inf)  # what is left is the tail
        tails = []
        for temperature in self.temperatures:
            kept = torch.logsumexp(values / temperature, dim=1)
            tail = torch.logsumexp(dense if temperature == 1.0 else dense / temperature, dim=1)
            tails.append(torch.nn.functional.logsigmoid(tail - kept))  # log(tail / (tail + kept))
        return SparseLogits(
            ids.masked_fill(~mask, 0),
            values - normaliser[:, None],
            mask,
            torch.stack(tails, dim=1),
            self.temperatures,
        )

    def encode(self, sparse: SparseLogits) -> Record:
        """Pack rows into the plain arrays of a record.

        Args:
            sparse: What `select` returned (or `decode`), on any device; its temperatures must be the codec's.

        Returns:
            `entry_count` u1 `[A]`, `token_ids` u4 `[E]`, `log_gap` u1 or f4 `[E]`, `top_logprob` f2 or f4
            `[A]` in nats, `tail_logmass` f2 or f4 `[A, temperatures]` in nats.

        Raises:
            ValueError: If the temperatures or the number of entries are not the codec's.
        """
        mask = sparse.entry_mask.cpu().numpy()  # [A, K]
        counts = np.count_nonzero(mask, axis=1)
        if sparse.temperatures != self.temperatures or counts.max(initial=1) > self.max_k:
            raise ValueError(
                f"encode: codec has max_k {self.max_k} and temperatures {self.temperatures}, rows have "
                f"{counts.max(initial=0)} entries and temperatures {sparse.temperatures}"
            )
        real = np.float32 if self.exact else np.float16
        where = _entry_positions(counts, mask.shape[1])
        log_probs = sparse.log_probs.float().cpu().numpy()
        top = log_probs[:, 0] if len(log_probs) else np.zeros(0, np.float32)
        gaps = np.repeat(top, counts) - log_probs.reshape(-1)[where]
        codes = gaps if self.exact else encode_gaps(gaps)
        with np.errstate(over="ignore"):  # a log-mass below -65504 is a mass of zero
            tails = sparse.tail_log_mass.float().cpu().numpy().astype(real)
        return {
            "entry_count": counts.astype(np.uint8),
            "token_ids": sparse.token_ids.cpu().numpy().reshape(-1)[where].astype(np.uint32),
            "log_gap": gap_steps(codes, counts) if self.gap_steps else codes,
            "top_logprob": top.astype(real),
            "tail_logmass": tails,
        }

    def decode(self, record: Record) -> SparseLogits:
        """Unpack the rows of a record; the inverse of `encode` within the class's bounds.

        Raises:
            CacheFormatError: If counts and arrays do not fit each other.
        """
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
        width = int(counts.max(initial=0))
        codes = gap_codes(record["log_gap"], counts) if self.gap_steps else record["log_gap"]
        gaps = codes if self.exact else GAP_TABLE[codes]
        where = _entry_positions(counts, width)
        ids = np.zeros(rows * width, np.int64)
        ids[where] = record["token_ids"]
        log_probs = np.full(rows * width, -np.inf, np.float32)
        listed = np.repeat(record["top_logprob"].astype(np.float32), counts) - gaps
        if self.balanced:
            kept = -np.expm1(tails[:, self.temperatures.index(1.0)].astype(np.float32))  # one less the tail's mass
            listed = balance(listed, codes, counts, kept)
        log_probs[where] = listed
        mask = np.arange(width) < counts[:, None]
        return SparseLogits(
            torch.from_numpy(ids.reshape(rows, width)),
            torch.from_numpy(log_probs.reshape(rows, width)),
            torch.from_numpy(mask),
            torch.from_numpy(tails.astype(np.float32)),
            self.temperatures,
        )

    def _empty(self, device: torch.device) -> SparseLogits:
        return SparseLogits(
            torch.zeros(0, 0, dtype=torch.int64, device=device),
            torch.zeros(0, 0, device=device),
            torch.zeros(0, 0, dtype=torch.bool, device=device),
            torch.zeros(0, len(self.temperatures), device=device),
            self.temperatures,
        )


def _entry_positions(counts: np.ndarray, width: int) -> np.ndarray:
    """Flat positions, in a row-major `[A, width]` array, of the first `counts[a]` entries of each row."""
    counts = counts.astype(np.int64)
    starts = np.cumsum(counts) - counts  # of each row among the entries
    shift = np.arange(len(counts), dtype=np.int64) * width - starts
    return np.repeat(shift, counts) + np.arange(int(counts.sum()), dtype=np.int64)


def _check_largest(largest: Tensor, dense: Tensor, first_row: int) -> None:
    """Refuse rows that are no distribution: the largest logit is NaN if any is, or +inf; of all -inf it is -inf."""
    finite = torch.isfinite(largest)
    if bool(finite.all()):
        return
    row = int(torch.nonzero(~finite)[0, 0])
    nans, infs = int(torch.isnan(dense[row]).sum()), int(torch.isposinf(dense[row]).sum())
    what = f"{nans} NaN and {infs} +inf logits" if nans or infs else "no finite logit"
    raise SampleError(
        f"row {first_row + row}: expected at least one finite logit and neither NaN nor +inf, got {what}; "
        "if the teacher runs in float16, try bfloat16 or float32"
    )


def _top_by_lowest_id(dense: Tensor, count: int, *, find_ties: bool) -> tuple[Tensor, Tensor]:
    """The `count` largest values of each row and their ids, equal values by lowest id.

    `topk` breaks ties as it likes; with bfloat16 logits ties at the last rank are the rule. So one more
    value is looked at: only rows where it equals the last kept one need a second, exact pass, and only rows with any
    equal values are sorted anew. Without `find_ties` all rows get both: on a GPU, which ones need it would have to be
    waited for, and the passes cost little.
    """
    vocabulary = dense.shape[1]
    values, ids = dense.topk(min(count + 1, vocabulary), dim=1)
    every = torch.arange(len(dense), device=dense.device)
    equals = torch.nonzero((values[:, 1:] == values[:, :-1]).any(dim=1))[:, 0] if find_ties else every
    if vocabulary > count:
        tied = torch.nonzero(values[:, count - 1] == values[:, count])[:, 0] if find_ties else every
        values, ids = values[:, :count].contiguous(), ids[:, :count].contiguous()
        if tied.numel():
            rows = dense[tied]
            last = values[tied, count - 1 :]  # [tied, 1]
            # Keys: all values above the last one first, then the equal ones by falling id distance.
            order = torch.arange(vocabulary, 0, -1, dtype=torch.int32, device=dense.device)
            keys = torch.where(rows == last, order, torch.where(rows > last, order + vocabulary, 0))
            ids[tied] = keys.topk(count, dim=1).indices
            values[tied] = rows.gather(1, ids[tied])
    if equals.numel():
        by_id, place = ids[equals].sort(dim=1)
        values[equals], place = values[equals].gather(1, place).sort(dim=1, descending=True, stable=True)
        ids[equals] = by_id.gather(1, place)
    return values, ids


AXES = {"row": "visual", "entry": "visual_entry"}
PREFIX = "visual_"


@dataclass(frozen=True, kw_only=True)
class VisualLogitsCodec(LogitCodec):
    """How a record stores logits of visual rows; presets, bounds and settings are those of ``LogitCodec``.

    Stored once per image and prefix, like all that visual rows see.

    Source:
        LLaVA-KD (arXiv 2410.16236), section 3: distillation of visual tokens' output distributions.
    """

    signal: ClassVar[str] = "visual_logits"

    def fields(self) -> tuple[Field, ...]:
        """As ``LogitCodec.fields``, per visual token."""
        return tuple(replace(field, name=PREFIX + field.name, axis=AXES[field.axis]) for field in super().fields())

    @torch.no_grad()
    def select_rows(self, logits: Tensor) -> SparseLogits:
        """Keep the likely tokens of dense logits ``[N, V]``; see ``LogitCodec.select``."""
        return self.select(logits, logits.argmax(dim=1))

    def encode(self, sparse: SparseLogits) -> Record:
        """Pack rows ``[N]``; see ``LogitCodec.encode``."""
        return {PREFIX + name: array for name, array in super().encode(sparse).items()}

    def decode(self, record: Record) -> SparseLogits:
        """Unpack rows ``[N]``; see ``LogitCodec.decode``."""
        return super().decode(plain_names(record))


def plain_names(record: Record) -> Record:
    """The arrays of ``visual_logits`` under the names that ``logits`` gives them."""
    names = ("entry_count", "token_ids", "log_gap", "top_logprob", "tail_logmass")
    return {name: record[PREFIX + name] for name in names}
