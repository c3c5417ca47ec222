"""``plan.json``: what a cache will hold, written before its first shard and never changed.

It fixes which samples belong to which shard, so that any number of processes can share the work and any
number can resume it. It holds no time, no host and no absolute path: the same inputs give the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from vlm_distill_cache.common.cache import other_folders
from vlm_distill_cache.common.cache.document_rules import MAX_PLAN_BYTES, MAX_SHARDS
from vlm_distill_cache.common.cache.document_rules import PLAN as PLAN_RULE
from vlm_distill_cache.common.cache.documents import (
    describe_differences,
    read_document,
    write_document,
)
from vlm_distill_cache.common.cache.schema import ONE_PICTURE, Field, base_fields, check_fields
from vlm_distill_cache.common.errors import CacheFormatError, CacheMismatchError
from vlm_distill_cache.common.files.hashing import fingerprint
from vlm_distill_cache.common.files.rules import AGAIN, check
from vlm_distill_cache.common.locations import by_make
from vlm_distill_cache.common.printing import one_line

PLAN, SHARDS = other_folders.PLAN, other_folders.SHARDS
STORE_NAMES = ("zarr", "webdataset")
DESCRIPTIVE = ("name", "revision", "license", "cache_license", "source")  # in `teacher` and `data`: for people only
LONG_SAMPLES = "long_samples"  # in `extra`: "truncate" where long samples were cut; absent where they were refused
PROJECTION = "output_projection"  # in `extra`: "float32" where but for it a teacher ran in half precision; else absent
RANKS = "tensor_parallel"  # in `extra`: processes that held the teacher together, on which the last bits depend; absent: one
THREADS = "threads"  # in `extra`: CPU threads of the arithmetic, on which the last bits depend
_MOST_LINES = 12  # of differences
_FOLLOWS = ("  fingerprints.", "  geometry.")  # from settings, which are named first
FRAMES = "frames"  # in `extra`: which frames of videos were read, {"fps": ..., "most": ...}; absent without a video
BASE = "base"  # the name under which base fields are reported beside the signals
_OBJECTS = ("signals", "fingerprints", "template", "teacher", "data", "geometry", "extra")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a cache will hold, fixed before its first shard. ``plan.json``.

    Attributes:
        sample_count: Samples of the data set, failed ones included.
        shard_size: Samples a shard; shard i holds samples ``[i * shard_size, (i + 1) * shard_size)``.
        signals: Codec settings by signal, as ``codec.to_dict()``.
        fields: The arrays of each signal, ``codec.fields()``; readers need no codec to open a cache.
        fingerprints: Hash of meaning by what it covers (teacher, tokenizer, template, data, ...).
        template, teacher, data, geometry: Readable descriptions, JSON; free keys.
        batch_size: Samples a teacher batch; batches form inside a shard, so it decides the exact bits.
        extra: Anything else that must not change on resume.
        format_version: Of its records: 1 with one picture a sample at most, else 2.

    Raises:
        CacheFormatError: If a value breaks the schema of a plan or ``signals`` and ``fields`` differ in keys.
    """

    store: str
    sample_count: int
    shard_size: int
    signals: dict[str, dict[str, Any]]
    fields: dict[str, tuple[Field, ...]]
    fingerprints: dict[str, str] = field(default_factory=dict)
    template: dict[str, Any] = field(default_factory=dict)
    teacher: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    geometry: dict[str, Any] = field(default_factory=dict)
    batch_size: int = 1
    extra: dict[str, Any] = field(default_factory=dict)
    format_version: int = ONE_PICTURE

    def __post_init__(self) -> None:
        if self.store not in STORE_NAMES:
            raise CacheFormatError(f"plan: store {self.store!r}; expected one of {', '.join(STORE_NAMES)}")
        for name in _OBJECTS:  # JSON has no tuples: a plan must equal itself after a round trip
            object.__setattr__(self, name, _plain(getattr(self, name)))
        check(self.to_dict(), PLAN_RULE, "plan", remedy="change the option that it comes from")
        if self.shard_count > MAX_SHARDS:
            raise CacheFormatError(
                f"plan: {self.sample_count} samples in shards of {self.shard_size} make {self.shard_count} "
                f"shards, above {MAX_SHARDS}; use {-(-self.sample_count // MAX_SHARDS)} or more a shard"
            )
        if self.signals.keys() != self.fields.keys() or BASE in self.signals:
            raise CacheFormatError(
                f"plan: signals {sorted(self.signals)} but fields for {sorted(self.fields)}; "
                "pass {signal: codec.to_dict()} and {signal: codec.fields()} of the same codecs"
            )
        check_fields(self.all_fields)

    @property
    def shard_count(self) -> int:
        """Number of shards."""
        return -(-self.sample_count // self.shard_size)

    @property
    def all_fields(self) -> tuple[Field, ...]:
        """The fields of a record: the base fields and those of each signal, in a fixed order."""
        return base_fields(self.format_version) + tuple(
            f for signal in sorted(self.fields) for f in self.fields[signal]
        )

    def shard_range(self, index: int) -> range:
        """Return the positions in the data set that shard ``index`` holds."""
        start = index * self.shard_size
        return range(start, min(start + self.shard_size, self.sample_count))

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON of plan.json."""
        names = [name for name in self.__dataclass_fields__ if name != "fields"]
        fields = {signal: [f.to_dict() for f in group] for signal, group in self.fields.items()}
        return {name: getattr(self, name) for name in names} | {"fields": fields}

    def without_descriptions(self) -> dict[str, Any]:
        """Return the JSON without what is for people only: names differ between machines, fingerprints decide."""
        described = self.to_dict()
        for part in ("teacher", "data"):
            described[part] = _undescribed(described[part])
        if isinstance(entries := described["data"].get("mixture"), list):
            described["data"]["mixture"] = [_undescribed(part) for part in entries if isinstance(part, dict)]
        return described

    @classmethod
    def from_dict(cls, data: Any, where: str = PLAN) -> Plan:
        """Read what ``to_dict`` wrote."""
        values = check(data, PLAN_RULE, where)
        try:
            fields = {k: tuple(Field.from_dict(f) for f in group) for k, group in values["fields"].items()}
            return cls(**(values | {"fields": fields}))
        except CacheFormatError as error:
            raise CacheFormatError(f"{where}: {error}") from error

    def stated(self, name: str, where: Path | str = "the cache") -> Any:
        """What a plan must say for some use of its cache: ``teacher.layers``, for one.

        Raises:
            CacheFormatError: If it does not.
        """
        part, _, key = name.partition(".")
        value = getattr(self, part).get(key)
        if value is None:
            raise CacheFormatError(f"{where}: {PLAN}: {name} is missing, and is needed here; {AGAIN}")
        return value

    @property
    def hash(self) -> str:
        """Fingerprint of the whole plan."""
        return fingerprint(self.to_dict())


def cut_words(plan: Plan) -> str:
    """What became of samples that were too long, where they were not refused; else nothing."""
    if plan.extra.get(LONG_SAMPLES) != "truncate":
        return ""
    return f"samples of more than {plan.extra.get('max_length')} tokens were cut at their end"


def write_plan(cache_dir: Path, plan: Plan) -> None:
    """Write plan.json, or accept the equal one that is there.

    Raises:
        CacheMismatchError: If the cache was begun with other settings, naming each difference.
    """
    cache_dir.mkdir(parents=True, exist_ok=True)
    (cache_dir / SHARDS).mkdir(exist_ok=True)
    try:
        write_document(cache_dir / PLAN, plan.to_dict(), create_only=True)
    except FileExistsError:
        refuse_changed_plan(read_plan(cache_dir), plan, where=str(cache_dir))


def read_plan(cache_dir: Path, *, sketch: bool = False) -> Plan:
    """Read plan.json.

    Args:
        sketch: Take that of a sketch, too.

    Raises:
        CacheFormatError: If there is none, or it is damaged or from a newer format.
    """
    path = cache_dir / PLAN
    if not sketch and other_folders.is_sketch(cache_dir):
        raise CacheFormatError(f"{cache_dir}: {other_folders.IS_SKETCH}")
    try:
        return Plan.from_dict(read_document(path, max_bytes=MAX_PLAN_BYTES), str(path))
    except FileNotFoundError:
        raise CacheFormatError(
            f"{cache_dir}: not a teacher cache (no {PLAN}): {other_folders.describe_folder(cache_dir)}; build one with "
            "`teacher-cache build`, or give the folder that holds plan.json"
        ) from None


def planned_shards(cache_dir: Path) -> int:
    """Number of shards of the plan in a folder, on which depends where they lie; 0 where there is none.

    Raises:
        CacheFormatError: As `read_plan`.
    """
    try:
        found = (cache_dir / PLAN).stat()
    except OSError:
        return 0
    return _planned_shards(cache_dir, found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size)


@lru_cache(maxsize=64)
def _planned_shards(cache_dir: Path, *_identity: int) -> int:
    return read_plan(cache_dir).shard_count


def refuse_changed_plan(old: Plan, new: Plan, *, where: str = "the cache") -> None:
    """Refuse to go on with other settings than a cache was begun with."""
    before, now = old.without_descriptions(), new.without_descriptions()
    if before == now:
        return
    if _holds_more(old, new):
        held = ", ".join(sorted(old.signals))
        raise CacheMismatchError(
            f"{where} holds all signals that are asked for, and more (as `teacher-cache extend` adds them). To use it as it is, "
            f"write signals: [{held}] where {', '.join(sorted(new.signals))} stands now, "
            f"{by_make(f'SIGNALS={held} (--signals)'.replace(', ', ','), f'--signals {held}'.replace(', ', ','))} or in the YAML "
            f"file; for a smaller cache give another folder ({by_make('CACHE=...', '--cache')})"
        )
    for part in (before, now):  # what follows from settings: arrays, and how well the teacher did
        part.pop("fields")
        part["teacher"] = {name: value for name, value in part["teacher"].items() if name != "evaluation"}
    lines = describe_differences(before, now, there="the cache", here="this run")
    lines.sort(key=lambda line: line.startswith(_FOLLOWS))
    if len(lines) > _MOST_LINES:
        lines[_MOST_LINES:] = [f"  ... and {len(lines) - _MOST_LINES} more"]
    kept, wanted = (", ".join(sorted(plan.signals)) for plan in (old, new))
    if kept != wanted:
        lines.insert(0, f"  signals: {kept} in the cache, {wanted} in this run, which also changes:")
    if not lines:
        lines = ["  its arrays, or its teacher's scores, are those of another version"]
    lines += _moved(old, new)
    if _has_all(old, new) and old.sample_count > new.sample_count:
        lines.append(
            f"  the cache has {old.sample_count} samples, of {one_line(old.data.get('name'))}, and {new.sample_count} are asked "
            "for: if it was extended since, write the data and limit that it was extended to, and it is used as it is"
        )
    raise CacheMismatchError(
        f"{where} was built with other settings:\n" + "\n".join(lines) + "\n"
        "Use the same options, another folder ("
        f"{by_make('CACHE=...', '--cache')}), or start this one again: delete it, or add --overwrite "
        f"to `{built_with(new)}`."
    )


def _has_all(old: Plan, new: Plan) -> bool:
    """Whether a cache is of the teacher that is asked for, with its signals as they are asked for, and maybe others."""
    same = old.fingerprints.get("teacher") == new.fingerprints.get("teacher")
    return same and all(old.signals.get(name) == settings for name, settings in new.signals.items())


def _holds_more(old: Plan, new: Plan) -> bool:
    """Whether a cache has more signals than are asked for, and is as it is to be in all else."""
    parts = ("store", "sample_count", "shard_size", "template", "batch_size", "extra")
    return (
        _has_all(old, new)
        and old.signals.keys() != new.signals.keys()
        and old.fingerprints.get("data") == new.fingerprints.get("data")
        and all(getattr(old, name) == getattr(new, name) for name in parts)
    )


def _undescribed(part: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in part.items() if name not in DESCRIPTIVE}


def _moved(old: Plan, new: Plan) -> list[str]:
    """A line for each thing on the hub that is another one since a cache was begun: what goes on with the old one."""
    lines = []
    (name, was), (_, now) = ((plan.teacher.get("name"), plan.teacher.get("revision")) for plan in (old, new))
    if was and was != now and old.fingerprints.get("teacher") != new.fingerprints.get("teacher"):
        lines.append(
            f"  the teacher was {name}@{was}: "
            f"{by_make(f'TEACHER={name}@{was} (--teacher)', f'--teacher {name}@{was}')} goes on with that one"
        )
    if old.fingerprints.get("data") == new.fingerprints.get("data"):
        return lines
    known = "data" in old.fingerprints and "data" in new.fingerprints
    if known and old.data.get("name") == new.data.get("name") and old.sample_count == new.sample_count:
        lines.append("  the data are not what they were: questions, answers or ids changed, or their order")
    if kept := _left(old.data, new.data):
        lines.append(f"  the data were {kept}: {by_make(f'DATA={kept} (--data)', f'--data {kept}')} goes on with them")
    entries = [described_parts(plan.data.get("mixture")) for plan in (old, new)]
    for number, (before, after) in enumerate(zip(*entries, strict=False), start=1):
        if kept := _left(before, after):
            lines.append(f"  entry {number} of the mixture was {kept}: write `data: {kept}` there to go on with it")
    return lines


def _left(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """What to type for data of a repository that has moved on since; empty if it has not."""
    name, was = old.get("repository"), old.get("revision")
    moved = name and was and name == new.get("repository") and was != new.get("revision")
    return hub_data_words(old) if moved else ""


def hub_data_words(data: Mapping[str, Any]) -> str:
    """What to type for data of a repository of the hub, as a plan describes them: ``org/name[@revision][/file][:name=...]``."""
    parts = {"revision": "@{}", "file": "/{}", "config": ":name={}"}
    return str(data["repository"]) + "".join(form.format(data[key]) for key, form in parts.items() if data.get(key))


def described_parts(listed: object) -> list[dict[str, Any]]:
    """The entries of a mixture, or the parts of merged data, as a plan describes them: a stranger may have written it."""
    return [part if isinstance(part, dict) else {} for part in listed] if isinstance(listed, list) else []


def built_with(plan: Plan) -> str:
    """The command that writes a cache, or what is missing of it."""
    return "cachectl import-logprobs" if plan.teacher.get("served") else "teacher-cache build"


def with_more(plan: Plan, remedy: str, *, options: str = "") -> str:
    """What gives a cache that holds more: of a teacher that was served its responses tell nothing else, only its weights do.

    Args:
        remedy: For a cache that `teacher-cache build` made.
        options: Of ``teacher-cache build``, that another cache needs.
    """
    if not plan.teacher.get("served"):
        return remedy
    return (
        "build a cache from the teacher's weights (this one was imported from a server's log-probabilities, which hold no more): "
        f"teacher-cache build --teacher DIR{f' {options}' if options else ''}"
    )


def card_store_line(plan: Plan) -> str:
    """Return the line of a cache's card that depends on the store; a converted cache gets a new one."""
    return f"- Store: {plan.store}, format version {plan.format_version}\n"


def _plain(value: Any) -> Any:
    """Copy nested dicts and lists, with tuples as lists."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
