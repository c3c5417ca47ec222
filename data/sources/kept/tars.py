"""The samples of tars as arrays: which members each has, and where in the archive these lie.

Of each archive there is one index, 60 bytes a sample, made when the archive is first seen and kept (`kept.store`); of a
set of archives only how many samples each has is read when it is opened. The index of an archive is mapped when one of
its samples is asked for, and a few are mapped at a time, so that a process's own memory does not grow with the data.
"""

import functools
import logging
import multiprocessing
import os
import re
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from vlm_distill_cache.common.cache.index import hash_ids
from vlm_distill_cache.common.files.hashing import fingerprint
from vlm_distill_cache.common.remotes.copies import RemoteFile
from vlm_distill_cache.data.images.load import FileSlice
from vlm_distill_cache.data.images.recognise import VIDEO_EXTENSIONS, picture_extensions
from vlm_distill_cache.data.sample import Survey, usable_ids
from vlm_distill_cache.data.sources.kept.headers import Archive, Member, read_members
from vlm_distill_cache.data.sources.kept.store import KEPT_FROM, Kept, kept_path, read_kept, stamp_of, write_kept

logger = logging.getLogger(__name__)

ROLES = ("json", "txt", "images", "videos", "others")
_JSON, _TXT, _IMAGES, _VIDEOS, _OTHERS = range(len(ROLES))
_TEXTS = {"json": _JSON, "txt": _TXT, "text": _TXT, "caption": _TXT}
_KEY = re.compile(r"((?:.*/|)[^./][^./]*)\.([^/]*)", re.DOTALL)  # `webdataset.tariterators.base_plus_ext`
# What systems leave, and WebDataset's own metadata, which it passes over where a name begins so.
_HIDDEN = re.compile(r"(.*/)?(\._[^/]*|\.DS_Store|Thumbs\.db|desktop\.ini)|__MACOSX/.*", re.DOTALL)
_METADATA = re.compile(r"__[^/]*__(/.*)?", re.DOTALL)
_MAPPED = 256  # indexes at a time
_SHARED_FROM = 256 << 20  # bytes of archives, from which on several processes index them
_MOST_PROCESSES = 64
_KEYS_AT_A_TIME = 1 << 14


@dataclass
class TarSample:
    """Where the parts of one sample lie; ``others``: members of unknown kinds; ``problem``: why it cannot be used."""

    key: str
    texts: dict[str, FileSlice] = field(default_factory=dict)
    images: list[FileSlice] = field(default_factory=list)
    videos: list[FileSlice] = field(default_factory=list)
    others: list[FileSlice] = field(default_factory=list)
    problem: str = ""


class TarSamples:
    """The samples of several archives, one after another; picklable.

    Attributes:
        counts: Samples of each archive, int64 ``[archives]``.
        of: What all of it was made of, JSON: names, sizes and times of the archives.
        kept: Whether what is found out about the data is worth keeping: of much, and of what lies elsewhere.
        has_texts: Whether any sample has a text.
        first_problem: Why the first sample that cannot be used cannot be; empty: there is none.
        may_repeat: Whether two samples seem to have one key.
    """

    def __init__(self, paths: Sequence[Archive]) -> None:
        """Open what is kept of these archives, and make the rest.

        Raises:
            DataError: An archive cannot be read.
        """
        self._paths = list(paths)
        self._stamps = [stamp_of(path) for path in self._paths]
        self.of: Any = ["tars", self._stamps]
        size = sum(stamp[1] for stamp in self._stamps)
        self.kept = size >= KEPT_FROM or any(isinstance(path, RemoteFile) for path in paths)
        self._held: dict[int, Kept] = {}  # indexes that are not kept
        self._mapped: OrderedDict[int, Kept] = OrderedDict()
        self._last = (-1, TarSample(""))
        path = kept_path("sets", self.of) if self.kept else None
        found = read_kept(path, self.of)
        if found is None:
            if self.kept and size >= _SHARED_FROM and len(self._paths) > 1:
                self._make_together()
            found = self._describe()
            write_kept(path, self.of, found)
        self.counts: NDArray[np.int64] = np.array(found.arrays["counts"])
        self.has_texts, self.may_repeat = bool(found.notes["texts"]), bool(found.notes["repeats"])
        self.first_problem = str(found.notes["problem"])
        self._digests, self._shown = list(found.notes["digests"]), list(found.notes["shown"])
        self._ends: list[int] = np.cumsum(self.counts).tolist()

    def __len__(self) -> int:
        return self._ends[-1]

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_mapped": OrderedDict()}

    def sample(self, index: int) -> TarSample:
        """The sample at ``index``."""
        last_index, last_sample = self._last
        if last_index == index:  # each is asked for several times while it is read
            return last_sample
        number, at = self._find(index)
        kept, archive = self._index(number), self._paths[number]
        key = _keys(kept, at, at + 1)[0]
        made = TarSample(key, problem=kept.notes["problems"].get(str(at), ""))
        arrays, extensions = kept.arrays, kept.notes["extensions"]
        first, last = arrays["first_part"][at : at + 2].tolist()
        for part in range(first, last):
            name = f"{archive.name}:{key}.{extensions[int(arrays['extension'][part])]}"
            piece = FileSlice(archive, int(arrays["offset"][part]), int(arrays["size"][part]), name)
            role = ROLES[int(arrays["role"][part])]
            if role in ("json", "txt"):
                made.texts[role] = piece
            else:
                getattr(made, role).append(piece)
        self._last = (index, made)
        return made

    def survey(self) -> Survey:
        """What the archives say without a look at what the samples say: which there are, and how many pictures they have."""
        files = [
            [path.name, stamp[1], digest]
            for path, stamp, digest in zip(self._paths, self._stamps, self._digests, strict=True)
        ]
        pictures, with_videos, fullest = self._shown
        return Survey(
            fingerprint=fingerprint(["by files", files]),
            most_pictures=pictures,
            videos=with_videos,
            fullest="" if fullest < 0 else self.id_at(fullest),
        )

    def key(self, index: int) -> str:
        """The key of the sample at ``index``: its id, where that can be one."""
        number, at = self._find(index)
        return _keys(self._index(number), at, at + 1)[0]

    def odd_id(self, index: int) -> tuple[str, str] | None:
        """In place of a key that cannot be an id: an id, and what is wrong with the key."""
        number, at = self._find(index)
        odd = self._index(number).notes["odd"].get(str(at))
        return None if odd is None else (odd[0], odd[1])

    def id_at(self, index: int) -> str:
        """The id of the sample at ``index``."""
        odd = self.odd_id(index)
        return self.key(index) if odd is None else odd[0]

    def ids(self) -> Iterator[str]:
        """The ids of all samples, in order."""
        for number, count in enumerate(self.counts.tolist()):
            kept = self._index(number)
            for start in range(0, count, _KEYS_AT_A_TIME):
                keys = _keys(kept, start, min(count, start + _KEYS_AT_A_TIME))
                for place, (sample_id, _) in kept.notes["odd"].items():
                    if start <= int(place) < start + len(keys):
                        keys[int(place) - start] = sample_id
                yield from keys

    def keys(self) -> Iterator[str]:
        """The keys of all samples, in order."""
        for number, count in enumerate(self.counts.tolist()):
            yield from _keys(self._index(number), 0, count)

    def hashes(self) -> Iterator[NDArray[np.uint64]]:
        """Of each archive the upper and lower halves of its ids' xxh3_128, u8 ``[samples, 2]``."""
        for number in range(len(self._paths)):
            yield self._index(number).arrays["hash"]

    def _find(self, index: int) -> tuple[int, int]:
        index = range(len(self))[index]
        number = bisect_right(self._ends, index)
        return number, index - (self._ends[number - 1] if number else 0)

    def _index(self, number: int) -> Kept:
        found = self._held.get(number) or self._mapped.get(number)
        if found is None:
            found, is_kept = keep_index(self._paths[number], self._stamps[number] if self.kept else None)
            if not is_kept:
                self._held[number] = found
                return found
            self._mapped[number] = found
            while len(self._mapped) > _MAPPED:
                self._mapped.popitem(last=False)
        return found

    def _make_together(self) -> None:
        """Index archives in several processes; one that does not run to its end leaves its archives to this one."""
        if multiprocessing.current_process().daemon:  # may have no processes of its own
            return
        count = min(len(os.sched_getaffinity(0)), len(self._paths), _MOST_PROCESSES)
        if count < 2:
            return
        with ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("fork")) as pool:
            for _ in pool.map(_keep, self._paths, self._stamps, chunksize=max(1, len(self._paths) // (8 * count))):
                pass

    def _describe(self) -> Kept:
        counts, texts, problem, upper = [], False, "", [np.zeros(0, np.uint64)]
        digests: list[str] = []
        most, most_pictures, with_videos, fullest, before = (0, 0), 0, 0, -1, 0
        for number in range(len(self._paths)):
            kept = self._index(number)
            counts.append(len(kept.arrays["first_part"]) - 1)
            texts = texts or bool(kept.notes["texts"])
            problem = problem or next(iter(kept.notes["problems"].values()), "")
            upper.append(kept.arrays["hash"][:, 0])
            digests.append(_digest_of(kept))
            videos, pictures = _shown_in(kept)
            with_videos += int((videos > 0).sum())
            if len(pictures):
                at = int(np.lexsort((pictures, videos))[-1])
                most, fullest = max((most, fullest), ((int(videos[at]), int(pictures[at])), before + at))
                most_pictures = max(most_pictures, int(pictures.max()))
            before += counts[-1]
        ordered = np.concatenate(upper)
        ordered.sort()
        repeats = bool((ordered[1:] == ordered[:-1]).any())
        notes = {"texts": texts, "problem": problem, "repeats": repeats, "digests": digests}
        return Kept(notes | {"shown": [most_pictures, with_videos, fullest]}, {"counts": np.array(counts, np.int64)})


class OddIds(Mapping[int, str]):
    """What is wrong with the ids of samples of tars, by position."""

    def __init__(self, samples: TarSamples) -> None:
        self._samples = samples

    def __getitem__(self, index: int) -> str:
        odd = self._samples.odd_id(index) if 0 <= index < len(self._samples) else None
        if odd is None:
            raise KeyError(index)
        return odd[1]

    def __iter__(self) -> Iterator[int]:
        return (index for index in range(len(self._samples)) if self._samples.odd_id(index) is not None)

    def __len__(self) -> int:
        return sum(1 for _ in self)


def keep_index(path: Archive, stamp: Any) -> tuple[Kept, bool]:
    """The index of an archive, and whether it is kept; with no ``stamp`` it is not to be."""
    where = None if stamp is None else kept_path("tars", stamp)
    found = read_kept(where, stamp)
    if found is not None:
        return found, True
    made = make_index(path)
    if stamp is not None and stamp_of(path) == stamp and write_kept(where, stamp, made):
        found = read_kept(where, stamp)
    return (made, False) if found is None else (found, True)


def _keep(path: Archive, stamp: Any) -> None:
    keep_index(path, stamp)


def make_index(path: Archive) -> Kept:
    """Index an archive: its samples, in the order of their first members, then what belongs to none.

    Raises:
        DataError: It cannot be read.
    """
    groups: dict[str, list[tuple[str, Member]]] = {}
    strays: list[str] = []
    passed: list[str] = []
    for member in read_members(path):
        name = member.name
        key, extension = _plain_key(name)
        if key:
            groups.setdefault(key, []).append((extension, member))
        elif _HIDDEN.fullmatch(name):
            continue
        elif _METADATA.fullmatch(name):
            passed.append(name)
        elif found := _KEY.fullmatch(name):
            groups.setdefault(found[1], []).append((found[2], member))
        else:
            strays.append(f"{path.name}:{name}")
    if passed:
        logger.warning(
            "%s: %d members are metadata to WebDataset and are not read, the first %s", path, len(passed), passed[0]
        )
    return _pack(_Samples(path.name).of(groups, strays))


def _plain_key(name: str) -> tuple[str, str]:
    """Key and extension of a member, as `_KEY` has them, in a fifth of its time; two empty texts: look closer."""
    base = name[name.rfind("/") + 1 :]
    stem, dot, extension = base.partition(".")
    if not (stem and dot) or "__" in name or base in ("Thumbs.db", "desktop.ini"):
        return "", ""
    return name[: len(name) - len(extension) - 1], extension


@dataclass
class _Samples:
    """What an index is made of, as lists; ``parts``: role, extension, offset and size of each."""

    archive: str
    keys: list[str] = field(default_factory=list)
    problems: dict[int, str] = field(default_factory=dict)
    first_part: list[int] = field(default_factory=lambda: [0])
    parts: list[tuple[int, int, int, int]] = field(default_factory=list)
    extensions: dict[str, int] = field(default_factory=dict)

    def of(self, groups: Mapping[str, list[tuple[str, Member]]], strays: Iterable[str]) -> "_Samples":
        """Take an archive's members, by their keys."""
        for key, members in groups.items():
            self._add(key, members)
        for shown in strays:
            self._close(
                shown,
                f"{shown} belongs to no sample: its name has no extension or begins with a dot; expected KEY.EXTENSION",
            )
        return self

    def _close(self, key: str, problem: str = "") -> None:
        """End a sample, whose parts have been added."""
        if problem:
            self.problems[len(self.keys)] = problem
        self.keys.append(key)
        self.first_part.append(len(self.parts))

    def _add(self, key: str, members: Sequence[tuple[str, Member]]) -> None:
        """Add the sample of a key; or the samples that its members may have been meant as, none of which can be used."""
        archive, problem = self.archive, ""
        extensions = tuple(extension for extension, _ in members)
        if any(member.problem for _, member in members):
            problem = next(member.problem for _, member in members if member.problem)
            members = [one for one in members if not one[1].problem]
        elif len(set(extensions)) < len(extensions):
            names = [member.name for _, member in members]
            problem = f"{archive} holds {max(names, key=names.count)} twice"
        order, unclear = _shape(tuple(extension for extension, _ in members) if problem else extensions)
        if unclear and not problem and all("." in extension for extension in unclear):
            stems = [f"{key}.{extension.rpartition('.')[0]}" for extension in extensions]
            reason = (
                f"{archive} holds {len(unclear)} texts of the key {key!r} ({', '.join(unclear[:3])}): WebDataset ends a key "
                "at the first dot of a name; rename the members so that only the extension follows a dot"
            )
            for stem in dict.fromkeys(stems):
                self._close(stem, reason)
            return
        if unclear and not problem:
            problem = f"{archive} holds several texts of the key {key!r}: {', '.join(unclear[:3])}; keep one of them"
        for place, role in order:
            self._part(role, *members[place])
        self._close(key, problem)

    def _part(self, role: int, extension: str, member: Member) -> None:
        number = self.extensions.setdefault(extension, len(self.extensions))
        self.parts.append((role, number, member.offset, member.size))


def _pack(made: _Samples) -> Kept:
    ids, odd = usable_ids(made.keys)
    encoded = [key.encode("utf-8", "surrogatepass") for key in made.keys]
    parts = np.array(made.parts, dtype=np.uint64).reshape(-1, 4)
    arrays: dict[str, NDArray[Any]] = {
        "keys": np.frombuffer(b"".join(encoded), dtype=np.uint8),
        "key_at": np.cumsum([0, *map(len, encoded)], dtype=np.uint64),
        "hash": np.stack(hash_ids(ids), axis=1),
        "first_part": np.array(made.first_part, dtype=np.uint32),
        "role": parts[:, 0].astype(np.uint8),
        "extension": parts[:, 1].astype(np.uint32),
        "offset": np.ascontiguousarray(parts[:, 2]),
        "size": np.ascontiguousarray(parts[:, 3]),
    }
    notes = {
        "texts": bool((arrays["role"] <= _TXT).any()),
        "extensions": list(made.extensions),
        "problems": {str(place): reason for place, reason in made.problems.items()},
        "odd": {str(place): [ids[place], reason] for place, reason in odd.items()},
    }
    return Kept(notes, arrays)


@functools.cache
def _role(extension: str) -> int:
    kind = extension.lower().rsplit(".", 1)[-1]
    if kind in _TEXTS:
        return _TEXTS[kind]
    return _VIDEOS if kind in VIDEO_EXTENSIONS else _IMAGES if kind in picture_extensions() else _OTHERS


@functools.lru_cache(maxsize=4096)
def _shape(extensions: tuple[str, ...]) -> tuple[list[tuple[int, int]], list[str]]:
    """Of a sample's members, by their extensions, place and role of those that are kept; and texts of which one is too many.

    A plain extension is the sample's own text where others stand beside it (KEY.json, KEY.meta.json).
    """
    roles = [_role(extension) for extension in extensions]
    order: list[tuple[int, int]] = []
    unclear: list[str] = []
    for role in dict.fromkeys(role for role in roles if role <= _TXT):
        found = [place for place, other in enumerate(roles) if other == role]
        plain = [place for place in found if "." not in extensions[place]]
        order.append(((plain or found[:1])[-1], role))
        if not unclear and len(found) > 1 and len(plain) != 1:
            unclear = [extensions[place] for place in found]
    return [*order, *((place, role) for place, role in enumerate(roles) if role > _TXT)], unclear


def _digest_of(kept: Kept) -> str:
    """Hash of what an archive holds, and where."""
    digest = xxhash.xxh3_128()
    for name in ("keys", "key_at", "first_part", "role", "offset", "size"):
        digest.update(np.ascontiguousarray(kept.arrays[name]).tobytes())
    return digest.hexdigest()


def _shown_in(kept: Kept) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Of each sample the number of its videos, and of its pictures and videos."""
    starts, roles = kept.arrays["first_part"].astype(np.int64), kept.arrays["role"]
    ends = [np.concatenate([[0], np.cumsum(np.isin(roles, kinds))]) for kinds in ([_VIDEOS], [_IMAGES, _VIDEOS])]
    videos, shown = (end[starts[1:]] - end[starts[:-1]] for end in ends)
    return videos, shown


def _keys(kept: Kept, start: int, stop: int) -> list[str]:
    at = kept.arrays["key_at"][start : stop + 1].tolist()
    data = kept.arrays["keys"][at[0] : at[-1]].tobytes()
    return [data[a - at[0] : b - at[0]].decode("utf-8", "surrogatepass") for a, b in pairwise(at)]
