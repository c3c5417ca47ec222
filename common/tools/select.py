"""Pulling a part of a cache: some shards, samples or signals, or fewer tokens a row; a cache of its own.

Only what is needed is downloaded: the shards that hold the samples, and of a Zarr shard only the arrays of the
signals asked for. Each file is checked against its sidecar, each sidecar against the manifest. What comes out
is a derived cache (``common.tools.derive``): its plan says of which cache it is which part.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vlm_distill_cache.common.cache.index import INDEX, SampleIndex
from vlm_distill_cache.common.cache.layout import files_of_shard, shard_stem
from vlm_distill_cache.common.cache.manifest import Manifest, ShardSummary, refuse_other_plan
from vlm_distill_cache.common.cache.plan import PLAN, Plan, read_plan
from vlm_distill_cache.common.cache.schema import SEVERAL_FIELDS, Record
from vlm_distill_cache.common.cache.shared_images import SharedImages
from vlm_distill_cache.common.cache.side_files import refuse_occupied
from vlm_distill_cache.common.cache.sidecar import FileEntry, ShardSidecar, check_sidecar, read_sidecar, sidecar_name
from vlm_distill_cache.common.cache.stores import open_reader
from vlm_distill_cache.common.cache.stores.base import ShardReader
from vlm_distill_cache.common.codecs.logits import LogitCodec
from vlm_distill_cache.common.codecs.quantise import GAP_TABLE, gap_codes, gap_steps
from vlm_distill_cache.common.errors import CacheFormatError, CacheMismatchError, ConfigError
from vlm_distill_cache.common.files.atomic import clean_stale, remove, temporary_for
from vlm_distill_cache.common.files.disk import refuse_overlap
from vlm_distill_cache.common.files.hashing import fingerprint
from vlm_distill_cache.common.remotes import open_remote
from vlm_distill_cache.common.remotes.base import Remote
from vlm_distill_cache.common.remotes.fetch import fetch_files, read_remote_manifest
from vlm_distill_cache.common.tools.derive import Slot, carry_fidelity, derive_cache, derive_plan, recountable_unknown
from vlm_distill_cache.common.tools.derived_card import DERIVED

FloatArray = npt.NDArray[np.float64]


def truncated_codec(stored_codec: Mapping[str, Any], k: int) -> dict[str, Any]:
    """The settings of the smaller cache.

    Args:
        k: Most entries of a row from now on, at least 2: the top token and the ground truth.
    """
    codec = LogitCodec.from_dict(stored_codec)
    if isinstance(k, bool) or not isinstance(k, int) or not 2 <= k <= codec.max_k:
        raise ConfigError(
            f"top-k: expected a whole number from 2 to {codec.max_k}, the most entries a row of this cache has, got {k!r}"
        )
    return {**stored_codec, "max_k": k, "min_k": min(codec.min_k, k)}


def truncate_logits(record: Record, stored_codec: Mapping[str, Any], k: int) -> Record:
    """Keep at most `k` entries of each row; the last one is the ground truth if its rank is lower.

    Ids, counts and codes are exactly those of selecting from the dense logits at the smaller `k`. The tails
    add up probabilities rounded by the larger cache: the added mass is within the relative error that
    `gap_error` states, before the tail is rounded to its own dtype.

    Args:
        record: A whole record, `labels` included, written by the codec of `stored_codec`.

    Returns:
        A new record; all other fields are the same arrays.
    """
    truncated_codec(stored_codec, k)  # refuses an impossible k
    counts = record["entry_count"].astype(np.int64)  # [A]
    ids, tails = record["token_ids"], record["tail_logmass"]
    columns = len(stored_codec["temperatures"])
    fits = int(counts.sum()) == len(ids) == len(record["log_gap"]) and tails.shape == (len(counts), columns)
    if not fits or len(record["labels"]) != len(counts) or counts.min(initial=1) < 1:
        raise CacheFormatError(
            f"logits of a record: {len(counts)} rows announce {counts.sum()} entries, at least one each; found "
            f"{len(ids)} ids, {len(record['log_gap'])} gaps, {len(record['labels'])} labels and tails "
            f"{tails.shape}; the cache is damaged: run `cachectl verify`"
        )
    steps = bool(stored_codec.get("gap_steps", False))
    codes = gap_codes(record["log_gap"], counts) if steps else record["log_gap"]  # [E]
    kept = _kept_entries(ids, counts, record["labels"], k)  # [E]
    kept_counts = np.minimum(counts, k)
    gaps = codes if stored_codec["exact"] else GAP_TABLE[codes]
    masses = _tails(gaps.astype(np.float64), counts, kept, tails.astype(np.float64), stored_codec["temperatures"])
    with np.errstate(over="ignore"):  # a log-mass below -65504 is a mass of zero
        rounded = masses.astype(tails.dtype)
    cut = (counts > k)[:, None]
    codes = codes[kept]
    return {
        **record,
        "entry_count": kept_counts.astype(record["entry_count"].dtype),
        "token_ids": ids[kept],
        "log_gap": gap_steps(codes, kept_counts) if steps else codes,
        "tail_logmass": np.where(cut, rounded, tails),
    }


def _kept_entries(ids: np.ndarray, counts: np.ndarray, labels: np.ndarray, k: int) -> np.ndarray:
    """Which entries stay, bool `[E]`: ranks below k, the last of them given up for a ground truth further down."""
    rows = np.repeat(np.arange(len(counts)), counts)  # [E]
    ranks = np.arange(len(ids)) - np.repeat(np.cumsum(counts) - counts, counts)
    truth = ids == labels[rows]
    late = np.zeros(len(counts), bool)
    late[rows[truth & (ranks >= k)]] = True  # rows whose ground truth comes too late
    kept: np.ndarray = (ranks < k - late[rows]) | (truth & late[rows])
    return kept


def _tails(
    gaps: FloatArray, counts: np.ndarray, kept: np.ndarray, tails: FloatArray, temperatures: list[float]
) -> FloatArray:
    """The log-mass of all that is not kept, nats, float64 `[A, T]`.

    At each temperature the listed tokens share what the stored tail leaves, in proportion to their
    `exp(-gap / T)`: exactly the probabilities that `SparseLogits.at` gives them.
    """
    if not len(counts):
        return tails
    starts = np.cumsum(counts) - counts
    columns = []
    for column, temperature in enumerate(temperatures):
        weights = np.exp(-gaps / temperature)  # [E], 1 for the top token
        dropped = np.add.reduceat(np.where(kept, 0.0, weights), starts)  # [A]
        share = dropped / np.add.reduceat(weights, starts)
        tail = np.exp(np.minimum(tails[:, column], 0.0))
        with np.errstate(divide="ignore"):  # no mass at all: -inf
            columns.append(np.log(tail + (1 - tail) * share))
    return np.stack(columns, axis=1)


MAX_LIST_BYTES = 1 << 30  # of a file of sample ids
_STAGING = "source"  # of the downloads, inside the new cache, gone when it is sealed
_IDS = "sample_ids"  # the stores' own array


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which part of a cache; None takes all.

    Attributes:
        shards: By number, from 0.
        count: Only the first so many records of these shards.
        sample_ids: Only these records.
        signals: By name; what every record holds comes along.
        top_k: Most tokens of a row to keep of the logits, the ground truth among them.
    """

    shards: tuple[int, ...] | None = None
    count: int | None = None
    sample_ids: tuple[str, ...] | None = None
    signals: tuple[str, ...] | None = None
    top_k: int | None = None

    def __post_init__(self) -> None:
        for name in ("shards", "sample_ids", "signals"):
            if isinstance(getattr(self, name), str):
                raise ConfigError(f"{name}: expected several, got the text {getattr(self, name)!r}")
        if any(shard < 0 for shard in self.shards or ()):
            raise ConfigError(f"shards: expected numbers from 0, got {self.shards}")

    def describe(self) -> dict[str, Any]:
        """The JSON of the selection; a list of ids is named by its length and fingerprint."""
        ids = self.sample_ids
        described = {
            "shards": None if self.shards is None else list(self.shards),
            "count": self.count,
            "sample_ids": None if ids is None else {"count": len(ids), "fingerprint": fingerprint(ids)},
            "signals": None if self.signals is None else list(self.signals),
            "top_k": self.top_k,
        }
        return {name: value for name, value in described.items() if value is not None}


def parse_selection(*, shards: str | None, samples: str | None, signals: str | None, top_k: int | None) -> Selection:
    """Read a selection as it stands on a command line."""
    count, ids = None, None
    if samples is not None and samples.isdecimal():
        count = int(samples)
        if count < 1:
            raise ConfigError("--samples 0: give a number from 1, or a file with a sample id a line")
    elif samples is not None:
        ids = _read_ids(Path(samples))
    return Selection(
        shards=None if shards is None else _parse_ranges(shards),
        count=count,
        sample_ids=ids,
        signals=None if signals is None else _parse_names(signals),
        top_k=top_k,
    )


def _parse_names(text: str) -> tuple[str, ...]:
    names = {name.strip() for name in text.split(",")} - {""}
    if not names:
        raise ConfigError(f"--signals {text!r}: no name in it; write them as logits,answer_attention")
    return tuple(sorted(names))


def _parse_ranges(text: str) -> tuple[int, ...]:
    numbers: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or len(part) > 20:
            raise ConfigError(f"--shards {text!r}: {part!r} is no shard; write them as 0-3,7")
        low, high = int(first), int(last or first)
        if not low <= high < 1_000_000:
            raise ConfigError(f"--shards {text!r}: {part!r} is no range from a lower to a higher number")
        numbers |= set(range(low, high + 1))
    return tuple(sorted(numbers))


def _read_ids(path: Path) -> tuple[str, ...]:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_LIST_BYTES + 1)
        # As editors write them: with a mark at the beginning, and with carriage returns.
        lines = data.decode("utf-8-sig").split("\n") if len(data) <= MAX_LIST_BYTES else []
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"--samples {path}: neither a number nor a readable UTF-8 file of sample ids: {error}"
        ) from error
    ids = tuple(dict.fromkeys(line.removesuffix("\r") for line in lines if line.strip()))
    if not ids:
        raise ConfigError(f"--samples {path}: no sample ids in it, or above {MAX_LIST_BYTES} bytes")
    return ids


def pull_partial(
    location: str | Path,
    target: str | Path,
    selection: Selection,
    *,
    jobs: int = 8,
    on_shard: Callable[[], object] | None = None,
) -> Manifest:
    """Download a part of a cache and write it as a cache of its own; killed and called again, it goes on.

    Args:
        target: A new folder, or one that an earlier call with the same selection began.

    Raises:
        ConfigError: If the cache has no such shard or signal, or the folder holds something else.
        CacheMismatchError: If it does not hold a sample asked for, or the folder holds another cache.
        CacheFormatError: If what was downloaded is not what the manifest says.
        TransferError: If it could not be downloaded.
    """
    target = Path(target)
    refuse_overlap(target, location)
    refuse_occupied(target)
    target.mkdir(parents=True, exist_ok=True)
    clean_stale(target, _STAGING)
    try:
        with temporary_for(target / _STAGING, directory=True) as staging:
            source = _Source(open_remote(location), staging, jobs)
            return _derive(source, target, *_planned(source, selection), top_k=selection.top_k, on_shard=on_shard)
    finally:
        with contextlib.suppress(OSError):  # not empty: it is a cache, or the beginning of one
            target.rmdir()


def look_at_part(remote: Remote, selection: Selection, *, jobs: int = 8) -> tuple[Plan, int]:
    """What `pull_partial` would make: the smaller cache's plan, and how many bytes of shards it would download.

    Errors are those of `pull_partial`, as far as plan, index and sidecars tell, which are downloaded for this.
    """
    with tempfile.TemporaryDirectory() as scratch:
        source = _Source(remote, Path(scratch), jobs)
        plan, slots = _planned(source, selection)
        read = {slot.source for slot in slots if slot.failed is None}
        files = [needed_files(source.chosen_sidecars[shard].files, source.names) for shard in sorted(read)]
        return plan, sum(entry.size for chosen in files for entry in chosen.values())


def _planned(source: _Source, selection: Selection) -> tuple[Plan, list[Slot]]:
    """The plan of a part of a cache and its samples; ``source`` is told which fields are read."""
    signals = _select_signals(source.plan, selection)
    slots = _select_slots(source, selection)
    how: dict[str, Any] = {
        "kind": "part",
        "sources": [source.manifest.hash],
        "selection": selection.describe(),
        "of_samples": source.manifest.totals["samples"],
    }
    if DERIVED in source.plan.extra:
        how["before"] = source.plan.extra[DERIVED]
    plan = derive_plan(source.plan, sample_count=len(slots), how=how, signals=signals)
    # A plan from before images were shared gets a field that its source does not have.
    source.names = frozenset(f.name for f in plan.all_fields) & {f.name for f in source.plan.all_fields}
    return plan, slots


def _derive(
    source: _Source,
    target: Path,
    plan: Plan,
    slots: list[Slot],
    *,
    top_k: int | None,
    on_shard: Callable[[], object] | None,
) -> Manifest:
    stored = source.plan.signals.get(LogitCodec.signal, {})

    def read(slot: Slot) -> Record:
        record = source.read(slot.source, slot.sample_id)
        return record if top_k is None else truncate_logits(record, stored, top_k)

    return derive_cache(
        target,
        plan,
        slots,
        read,
        sources=[(source.remote, source.manifest)],
        fidelity=carry_fidelity(source.manifest.fidelity, source.plan, signals=plan.signals),
        unknown=recountable_unknown(source.chosen_sidecars.values()),
        on_shard=on_shard,
    )


def _select_signals(plan: Plan, selection: Selection) -> dict[str, dict[str, Any]]:
    wanted = tuple(plan.signals) if selection.signals is None else selection.signals
    if unknown := sorted(set(wanted) - plan.signals.keys()):
        raise ConfigError(
            f"--signals {','.join(wanted)}: the cache holds no {', '.join(unknown)}; "
            f"it holds {', '.join(sorted(plan.signals))}"
        )
    # Without them the data's answers would be taken for the ones that the other signals belong to.
    kept = {*wanted, *({"answers"} & plan.signals.keys())}
    signals = {name: plan.signals[name] for name in sorted(kept)}
    if selection.top_k is not None:
        if LogitCodec.signal not in signals:
            raise ConfigError(f"--top-k {selection.top_k}: no logits are pulled; add them to --signals")
        signals[LogitCodec.signal] = truncated_codec(signals[LogitCodec.signal], selection.top_k)
    return signals


def _select_slots(source: _Source, selection: Selection) -> list[Slot]:
    count = source.plan.shard_count
    shards: Sequence[int] = range(count) if selection.shards is None else selection.shards
    if beyond := [shard for shard in shards if shard >= count]:
        raise ConfigError(f"--shards: there is no shard {beyond[0]}; the cache has {count}, numbered from 0")
    wanted = None if selection.sample_ids is None else frozenset(selection.sample_ids)
    if wanted is not None:
        shards = source.shards_with(wanted, shards)
    slots: list[Slot] = []
    left = selection.count
    for shard, sidecar in source.sidecars(_enough(source.manifest, shards, left)).items():
        chosen = [name for name in sidecar.sample_ids if wanted is None or name in wanted]
        slots += [Slot(sample_id=name, source=shard) for name in chosen[:left]]
        left = None if left is None else left - len(chosen[:left])
        if selection.count is None:
            slots += [
                Slot(sample_id=name, failed=reason, source=shard)
                for name, reason in sidecar.failed
                if wanted is None or name in wanted
            ]
    if wanted is not None and len(slots) < len(wanted):
        missing = sorted(wanted - {slot.sample_id for slot in slots})
        raise CacheMismatchError(
            f"{source.remote.location}: {len(missing)} of {len(wanted)} samples are not in its "
            f"{'chosen ' if selection.shards else ''}shards; the first is {missing[0]!r}. Take them off the list"
        )
    if not slots:
        raise ConfigError("the selection holds no sample; choose other shards or samples")
    return slots


def _enough(manifest: Manifest, shards: Sequence[int], count: int | None) -> list[int]:
    """The first of the shards that together hold ``count`` records."""
    chosen: list[int] = []
    held = 0
    for shard in shards:
        if count is not None and held >= count:
            break
        chosen.append(shard)
        held += manifest.shards[shard].samples
    return chosen


class _Source:
    """A cache elsewhere, of which one shard at a time is here.

    Attributes:
        names: Fields that are read; None: all.
        chosen_sidecars: Those of the chosen shards, by shard.
    """

    def __init__(self, remote: Remote, folder: Path, jobs: int) -> None:
        self.remote = remote
        self._folder, self._jobs = folder, jobs
        self.manifest, _ = read_remote_manifest(remote)
        self._fetch({PLAN: self.manifest.files[PLAN]})
        self.plan = read_plan(folder)
        refuse_other_plan(self.manifest, self.plan, remote.location)
        self.names: frozenset[str] | None = None
        self._images = SharedImages(self.plan.all_fields)
        self.chosen_sidecars: dict[int, ShardSidecar] = {}
        self._open: tuple[int, ShardReader, dict[str, int]] | None = None

    def sidecars(self, shards: Sequence[int]) -> dict[int, ShardSidecar]:
        """Download sidecars, checked against the manifest."""
        count = self.plan.shard_count
        self._fetch({sidecar_name(shard, count): self.manifest.shards[shard].sidecar for shard in shards})
        self.chosen_sidecars = {shard: read_sidecar(self._folder, shard) for shard in shards}
        for shard, sidecar in self.chosen_sidecars.items():
            where = f"{self.remote.location}/{sidecar_name(shard, count)}"
            check_sidecar(sidecar, self.plan, where)
            if ShardSummary.of(sidecar) != self.manifest.shards[shard]:
                raise CacheFormatError(f"{where}: says other things than the manifest; damaged")
        return self.chosen_sidecars

    def shards_with(self, sample_ids: frozenset[str], shards: Sequence[int]) -> list[int]:
        """Those of the shards that hold any of the samples, as far as an index can tell without the sidecars."""
        if INDEX not in self.manifest.files:
            return list(shards)
        self._fetch({INDEX: self.manifest.files[INDEX]})
        index = SampleIndex.open(self._folder / INDEX, self.manifest.files[INDEX])
        places = (index.find(name) for name in sample_ids)
        held = {place.shard for place in places if place is not None}
        return [shard for shard in shards if shard in held]

    def read(self, shard: int, sample_id: str) -> Record:
        """Read a record; a shard is downloaded when its first record is read, and removed with the next."""
        if self._open is None or self._open[0] != shard:
            self._close()
            sidecar = self.chosen_sidecars[shard]
            self._fetch(needed_files(sidecar.files, self.names))
            reader = open_reader(self.plan.store, self._folder, shard, self.plan.all_fields)
            if reader.sample_ids != sidecar.sample_ids:
                raise CacheFormatError(
                    f"{self.remote.location}: shard {shard} holds other samples than its sidecar says"
                )
            self._open = shard, reader, {name: i for i, name in enumerate(reader.sample_ids)}
        _, reader, positions = self._open
        where = f"sample {sample_id!r} of {self.remote.location}"
        return self._images.read(reader, positions[sample_id], self.names, where=where)

    def _close(self) -> None:
        if self._open is not None:
            shard, reader, _ = self._open
            reader.close()
            self._open = None
            for path in files_of_shard(self._folder, shard_stem(shard, self.plan.shard_count)):
                remove(path)

    def _fetch(self, files: Mapping[str, FileEntry]) -> None:
        fetch_files(self.remote, self._folder, files, jobs=self._jobs)


def needed_files(files: Mapping[str, FileEntry], names: frozenset[str] | None) -> dict[str, FileEntry]:
    """Return the files of a shard without which these fields cannot be read.

    Args:
        names: The fields; None for all. A tar is needed whole.
    """
    if names is None:
        return dict(files)
    arrays = {_IDS, *names, *(field.name for field in SEVERAL_FIELDS)}
    arrays |= {f"{name}_offsets" for name in arrays}
    wanted = {}
    for path, entry in files.items():
        inside = path.partition(".zarr/")[2].split("/")  # shards/00000.zarr/ARRAY/c/0
        if len(inside) < 2 or inside[0] in arrays:
            wanted[path] = entry
    return wanted
