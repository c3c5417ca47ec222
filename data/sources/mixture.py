"""A mixture: a YAML list of data sets, each with its own pictures, limit and weight.

Both stages read it. To stage one it is one data set of all samples, each once; in stage two a weight says how often a
sample is seen in an epoch. The parts' samples are dealt evenly: each stretch of the mixture, its beginning too, holds
all parts by their sizes, so that a limit or a share of the data is a smaller mixture and not the first part.
"""

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vlm_distill_cache.common.errors import DataError
from vlm_distill_cache.common.files.yaml_text import YamlError, parse_yaml
from vlm_distill_cache.common.hub import hub_name
from vlm_distill_cache.common.locations import by_make
from vlm_distill_cache.common.printing import one_line
from vlm_distill_cache.data.sample import Dataset, Weighting, number_repeats
from vlm_distill_cache.data.sources.grouping import JoinedSamples
from vlm_distill_cache.data.sources.patterns import FILE_ENDINGS, file_of_repository

MIXTURES = (".yaml", ".yml")
NAMED = ("shapes", "easy-vqa", "photo-scenes")  # data sets that are no files
_KEYS = {
    "data": (str,),
    "images": (str,),
    "weight": (int, float),
    "limit": (int,),
    "split": (str,),
    "name": (str,),
    "streaming": (bool,),
    "cache": (str,),
}
_SPLITS = ("train", "validation", "test")


@dataclass(frozen=True, kw_only=True)
class Part:
    """One entry of a mixture.

    Attributes:
        data: What it names, as `data.registry` takes it; a path starts from the mixture's folder.
        images: Its image folder; None: the data's own, or the one given for all.
        weight: How often each of its samples is seen in an epoch of stage two; a fraction takes a fixed part of them.
        limit: Take its first samples only.
        split: Of a built-in data set, or of any by ``data``; None: the one asked for.
        cache: Where its own cache is, or is to be.
    """

    data: str
    images: Path | None = None
    weight: float = 1.0
    limit: int | None = None
    split: str | None = None
    cache: str | None = None

    def limit_within(self, limit: int | None) -> int | None:
        """How many samples are taken of it where ``limit`` holds for each entry: the smaller of both; None: all."""
        return min((number for number in (self.limit, limit) if number), default=None)


class MixtureDataset(JoinedSamples):
    """The samples of all parts, each once.

    An id that only one part has stays; one that several have gets its part's name in front, in each of them.
    """

    def __init__(self, parts: Sequence[Part], datasets: Sequence[Dataset], *, name: str) -> None:
        names = number_repeats(
            [dataset.name.removesuffix(f"[:{part.limit}]") for part, dataset in zip(parts, datasets, strict=True)]
        )
        sizes = [len(dataset) for dataset in datasets]
        super().__init__(datasets, name=name, names=names, order=deal(sizes))
        self._weights = tuple(part.weight for part in parts)
        self.origin = {
            "mixture": [
                {"name": called, "samples": size, **dataset.origin}
                for called, size, dataset in zip(names, sizes, datasets, strict=True)
            ]
        }

    def weighting(self) -> Weighting | None:
        """How often each sample is seen in an epoch of stage two; None if each is once."""
        return None if set(self._weights) == {1.0} else Weighting(self.parts, self._weights)


def open_mixture(
    path: Path,
    *,
    split: str,
    images: Path | None,
    open_part: Callable[..., Dataset],
    commits: Mapping[str, str] | Sequence[Mapping[str, str]],
) -> MixtureDataset:
    """Open the parts of a mixture with ``open_part``, which is `data.registry.open_dataset`; ``commits`` as there.

    Raises:
        DataError: The file is no mixture, or a part cannot be opened; says which.
    """
    parts = read_mixture(path)
    of_each = [commits] * len(parts) if isinstance(commits, Mapping) else [*commits, *[{}] * len(parts)]
    datasets = []
    for number, (part, known) in enumerate(zip(parts, of_each, strict=False), start=1):
        try:
            datasets.append(
                open_part(
                    part.data,
                    split=part.split or split,
                    images=part.images or images,
                    limit=part.limit,
                    commits=known,
                )
            )
        except DataError as error:
            raise DataError(f"{path}, entry {number}: {error}") from error
    return MixtureDataset(parts, datasets, name=path.name)


def read_mixture(path: Path) -> list[Part]:
    """Read the entries of a mixture; no data is opened.

    Raises:
        DataError: It is not YAML, no list, or an entry is wrong; says which and how.
    """
    try:
        entries = parse_yaml(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    except (YamlError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not YAML: {one_line(str(error))[:300]}") from error
    example = "- data: FILE.json\n  images: FOLDER\n  weight: 2".replace("\n", " / ")
    if isinstance(entries, Mapping):
        inner = [key for key, value in entries.items() if isinstance(value, list)]
        hint = f"; put what {inner[0]!r} holds at the top" if inner else ""
        raise DataError(
            f"{path} is a mapping with {sorted(map(str, entries))[:8]}; a mixture is a list: {example}{hint}"
        )
    if not isinstance(entries, list) or not entries:
        raise DataError(f"{path} {'is empty' if not entries else 'is no list'}; a mixture is a list: {example}")
    parts = [_part(entry, f"{path}, entry {number}", path.parent) for number, entry in enumerate(entries, start=1)]
    caches = [part.cache for part in parts if part.cache is not None]
    if len(set(caches)) < len(caches):
        raise DataError(f"{path}: two entries have one cache, {max(caches, key=caches.count)}; each needs its own")
    if len({part.cache is None for part in parts}) > 1:
        lacking = next(number for number, part in enumerate(parts, start=1) if part.cache is None)
        raise DataError(
            f"{path}, entry {lacking} has no cache, others have: give each its cache, or leave cache out for one of all"
        )
    return parts


def is_mixture(data: str | None) -> bool:
    """Whether ``DATA=`` names a mixture."""
    return data is not None and data.lower().endswith(MIXTURES) and Path(data).is_file()


def mixture_weights(data: str | None) -> list[float] | None:
    """The weights of the mixture that ``DATA=`` names; None if it is none, or each sample is seen once."""
    if data is None or not is_mixture(data):
        return None
    weights = [part.weight for part in read_mixture(Path(data))]
    return None if set(weights) == {1.0} else weights


def entry_of_cache(data: str, cache: str) -> Part | None:
    """The entry of a mixture whose cache that is; None if ``data`` is no mixture, or one cache holds all of it.

    Raises:
        DataError: The mixture's entries have caches, and this is none of them.
    """
    places = own_caches(data, cache)
    if places is None:
        return None
    return read_mixture(Path(data))[places.index(cache)]


def own_caches(data: str | None, cache: str) -> list[str] | None:
    """Where each entry's cache is, ``cache`` as it is written; None if ``data`` is no mixture or has one cache for all.

    Raises:
        DataError: ``cache`` is none of them: all are read together, and it is the one that speaks for them.
    """
    if data is None or not is_mixture(data):
        return None
    places = [part.cache for part in read_mixture(Path(data)) if part.cache is not None]
    if not places:
        return None
    same = [place for place in places if place == cache or ("://" not in place and _real(place) == _real(cache))]
    if not same:
        build = f"`teacher-cache build --data {data} --cache ...`"
        build = by_make(f"`make teacher-cache DATA={data} CACHE=...` (teacher-cache build --data --cache)", build)
        raise DataError(
            f"{data} gives each of its entries a cache, and {cache} is none of them. To build them, run {build} with "
            "each in turn; to train from "
            f"all of them, name one: {', '.join(by_make(f'CACHE={place}', f'--cache {place}') for place in places)}"
        )
    return [cache if place == same[0] else place for place in places]


def _real(place: str) -> Path:
    return Path(place).resolve()


def _part(entry: Any, where: str, folder: Path) -> Part:
    if isinstance(entry, str):
        entry = {"data": entry}
    if not isinstance(entry, Mapping):
        raise DataError(f"{where} must hold data and its options, got {type(entry).__name__} {str(entry)[:60]!r}")
    entry = {key: _number(value) if key == "weight" else value for key, value in entry.items()}
    for key, value in entry.items():
        kinds = _KEYS.get(key)
        if kinds is None:
            close = difflib.get_close_matches(str(key), _KEYS, n=1)
            meant = f"; did you mean {close[0]!r}?" if close else "."
            raise DataError(f"{where} has no option {str(key)!r}{meant} It has {', '.join(_KEYS)}")
        if (isinstance(value, bool) and bool not in kinds) or not isinstance(value, kinds) or value == "":
            wanted = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}[kinds[-1]]
            raise DataError(f"{where}: {key} must be {wanted}, got {value!r}")
    if "data" not in entry:
        raise DataError(f"{where} names no data; write - data: FILE")
    weight, limit = entry.get("weight", 1), entry.get("limit")
    if not (0 < weight < math.inf):
        raise DataError(f"{where}: weight must be above 0, got {weight}; leave the entry out to leave out its samples")
    if limit is not None and limit < 1:
        raise DataError(f"{where}: limit must be at least 1 sample, got {limit}; leave the entry out to take none")
    data = _place(entry["data"], folder)
    if data.lower().endswith(MIXTURES):
        raise DataError(f"{where}: {entry['data']} is a mixture itself; list its entries here")
    split = entry.get("split")
    if _base(data) in NAMED:
        if unread := [key for key in ("images", "name", "streaming") if key in entry]:
            raise DataError(f"{where}: {_base(data)} has no option {', '.join(unread)}; take {unread[0]} out")
        if split is not None and split not in _SPLITS:
            raise DataError(f"{where}: split must be {', '.join(_SPLITS)}, got {split!r}")
    else:
        options = {key: entry[key] for key in ("name", "split", "streaming") if key in entry}
        words = ",".join(
            f"{key}={str(value).lower() if value is True or value is False else value}"
            for key, value in options.items()
        )
        data, split = (f"{data},{words}" if _has_options(data) else f"{data}:{words}") if words else data, None
    images = entry.get("images")
    return Part(
        data=data,
        images=None if images is None else folder / images,
        weight=float(weight),
        limit=limit,
        split=split,
        cache=None if "cache" not in entry else _cache_place(entry["cache"], folder),
    )


def _number(value: Any) -> Any:
    """A number that YAML 1.1 takes for a text, such as 1e3; anything else as it is."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _place(data: str, folder: Path) -> str:
    """What a part names, its path from the mixture's folder; a name of the hub where there is no such path."""
    base = _base(data)
    if base in NAMED or Path(base).is_absolute():
        return data
    if not (folder / base).exists() and not base.lower().endswith(FILE_ENDINGS) and hub_name(base) is not None:
        return data
    if not (folder / base).exists() and file_of_repository(base, folder) is not None:
        return data
    return str(folder / data)


def _cache_place(cache: str, folder: Path) -> str:
    return cache if "://" in cache or Path(cache).is_absolute() else str(folder / cache)


def _base(data: str) -> str:
    return data.rpartition(":")[0] if _has_options(data) else data


def _has_options(data: str) -> bool:
    _, colon, rest = data.rpartition(":")
    return bool(colon) and "=" in rest and "/" not in rest


def deal(sizes: Sequence[int]) -> np.ndarray:
    """Positions in the concatenation such that each part is spread evenly over the whole, in its order, int64 ``[n]``."""
    keys = np.concatenate([(np.arange(size) + 0.5) / size for size in sizes])
    owners = np.repeat(np.arange(len(sizes)), sizes)
    return np.lexsort((owners, keys)).astype(np.int64)
