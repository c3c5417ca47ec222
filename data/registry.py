"""From what a user writes as ``DATA=`` to a data set.

| written | read by |
|---|---|
| ``shapes``, ``shapes:images=1500,seed=0`` | `data.shapes.dataset`, drawn in code |
| ``shapes:kinds=comparison+motion``, ``shapes:kinds=mixed`` | `data.shapes.kinds`: pairs of pictures, clips, texts |
| ``easy-vqa`` | `data.sources.easy_vqa` |
| ``photo-scenes``, ``photo-scenes:images=4000,seed=0,ground=natural`` | `data.photos.dataset`, of installed photographs |
| ``FILE.json``, ``FILE.jsonl``: a list | `data.sources.llava` |
| ``FILE.json``, ``FILE.jsonl``: an entry a line | `data.sources.messages` |
| a folder of ``datasets.save_to_disk``, or one holding exactly one such folder | `data.sources.hf` |
| ``FILE.tar``, ``{000..099}.tar``, ``*.tar``, a folder of tars | `data.sources.webdataset` |
| ``FILE.parquet``, ``{000..099}.parquet``, ``*.parquet`` | `data.sources.parquet` |
| either at ``s3://``, ``https://``; ``FILES:streaming=true`` here | `data.sources.addresses`; told by the files alone |
| ``FILE.csv``, ``FILE.tsv`` | `data.sources.csv_rows` |
| a folder as the hub lays data sets out: parquet, metadata beside pictures, tars, JSON | `data.sources.hub_data` |
| ``ORG/NAME``, ``ORG/NAME@REVISION:name=CONFIG,split=SPLIT,streaming=true`` | `data.sources.hub_data` |
| ``ORG/NAME[@REVISION]/FILE``, also a pattern; a pattern of JSON or CSV files | the reader of such files |
| ``FILE.yaml``: a list of data sets | `data.sources.mixture` |

A path comes before a name of the hub. A user's files have no splits (but a folder may, and then takes ``name=`` and
``split=`` like a name): whatever split is asked for, all of the file is meant, and evaluation uses the file it is
given. Hold data out by keeping it in another file.
"""

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType

from vlm_distill_cache.common.errors import DataError, SampleError
from vlm_distill_cache.common.hub import HubName, hub_name
from vlm_distill_cache.common.locations import by_make, is_url, nearest, nearest_path, public_location
from vlm_distill_cache.common.printing import brief
from vlm_distill_cache.data.sample import (
    Dataset,
    EvaluationSet,
    Question,
    Sample,
    questions_of,
)
from vlm_distill_cache.data.sources.addresses import KINDS, open_addresses
from vlm_distill_cache.data.sources.csv_rows import SUFFIXES
from vlm_distill_cache.data.sources.easy_vqa import EasyVqaDataset, easy_vqa_evaluation
from vlm_distill_cache.data.sources.grouping import ChosenSamples, JoinedSamples
from vlm_distill_cache.data.sources.hf import HuggingFaceDataset, is_saved_dataset, says_split
from vlm_distill_cache.data.sources.hub_data import Choice, open_file, open_folder, open_name
from vlm_distill_cache.data.sources.image_folder import METADATA
from vlm_distill_cache.data.sources.mixture import MIXTURES, MixtureDataset, open_mixture
from vlm_distill_cache.data.sources.parquet import LocalParquet, ParquetDataset
from vlm_distill_cache.data.sources.patterns import FILE_ENDINGS, file_of_repository, find_files, is_pattern
from vlm_distill_cache.data.sources.pictures import image_folder
from vlm_distill_cache.data.sources.webdataset import WebDataset

logger = logging.getLogger(__name__)

TEXTS = (".json", ".jsonl", ".ndjson", *SUFFIXES)
NO_COMMITS: Mapping[str, str] = MappingProxyType({})
SHAPES_IMAGES = 1500
SHAPES_ITEMS = 300  # evaluation items where no limit is given
ITEMS_OF_KINDS = 100  # as many of each of the 18 kinds of questions about several pictures
FILE_ITEMS = 2000  # questions taken from a user's file where no limit is given
SHORT_ANSWER_WORDS = 5
FORMS = (
    "shapes, photo-scenes, easy-vqa, FILE.json, FILE.jsonl, FILE.csv, FILE.parquet, a folder of parquet files, of pictures "
    "with metadata or of datasets.save_to_disk, uncompressed tars, a data set of the hub (ORG/NAME) or a file in one "
    "(ORG/NAME/FILE), or a mixture (FILE.yaml)"
)
_SLICED = re.compile(r":(?:[^/]*,)?split=[^,/\[+]*(\[[^\]/]*\]|\+[^,/]*)")
_WEB = re.compile(
    r"(?:https?://[^/]+/|hf://)?datasets/(?P<name>[\w.-]+/[\w.-]+)"
    r"(?:/(?:tree|blob|resolve|raw|viewer)/(?P<tree>[^/]+)(?:/(?P<file>.+?))?"
    r"|@(?P<at>[^/]+)(?:/(?P<inner>.+?))?|/(?P<rest>.+?))?/?",
    re.ASCII,
)
_OPTIONS = {"shapes": ("images", "seed", "kinds"), "easy-vqa": (), "photo-scenes": ("images", "seed", "ground")}
_OF_FOLDERS = ("name", "split", "streaming")


def open_dataset(
    spec: str,
    *,
    split: str = "train",
    images: Path | None = None,
    limit: int | None = None,
    commits: Mapping[str, str] | Sequence[Mapping[str, str]] = NO_COMMITS,
    strict: bool = False,
) -> Dataset:
    """Open the data a user names.

    Args:
        spec: See the module's table.
        split: ``train``, ``validation`` or ``test``; only named data sets and folders have splits.
        images: Folder that relative image paths start from; None: the folder of the file.
        limit: Take the first samples only.
        commits: By repository of the hub: which commit to read where no revision is named; of a mixture, one such
            mapping for all of its entries, or one for each.
        strict: Refuse a held-out split for which the training data, or all, is read: the data neither have it nor are it.

    Raises:
        DataError: Nothing can be read under that name; the message lists what can.
    """
    if limit is not None and limit < 1:
        raise DataError(f"limit must be at least 1 sample, got {limit}")
    try:
        name, options = _split_spec(spec)
    except OSError as error:  # a name longer than any file's
        raise DataError(f"data {brief(spec)!r} is no name: {error.strerror}; expected {FORMS}") from error
    dataset: Dataset
    if name == "shapes":
        from vlm_distill_cache.data.shapes.dataset import ShapesDataset  # drawing code, only needed here
        from vlm_distill_cache.data.shapes.kinds import ShapesOfKinds, parse_kinds

        numbers = _number(options, "images", SHAPES_IMAGES), _number(options, "seed", 0)
        kinds = options.get("kinds")
        dataset = (
            ShapesDataset(split, *numbers) if kinds is None else ShapesOfKinds(split, *numbers, parse_kinds(kinds))
        )
    elif name == "easy-vqa":
        dataset = EasyVqaDataset(split)
    elif name == "photo-scenes":
        from vlm_distill_cache.data.photos.dataset import IMAGES, PhotoScenes  # drawing code, only needed here

        numbers = _number(options, "images", IMAGES), _number(options, "seed", 0)
        dataset = PhotoScenes(split, *numbers, options.get("ground", "smooth"))
    else:
        dataset = _open_path(name, options, split, images, commits, strict=strict)
        if strict and split != "train" and not isinstance(dataset, MixtureDataset):
            _refuse_other_split(name, split, options.get("split"), dataset)
    if limit is None or limit >= len(dataset):
        return dataset
    return ChosenSamples(dataset, range(limit), name=f"{dataset.name}[:{limit}]")


def open_evaluation(
    spec: str,
    split: str = "test",
    limit: int | None = None,
    *,
    images: Path | None = None,
    on_failed: Callable[[str, str], None] = lambda sample_id, reason: None,
) -> EvaluationSet:
    """Open the evaluation items of the data a user names.

    A user's file gives questions: turns of at most five answer words that can be asked alone, i.e. the
    first turn of a conversation and every independent turn. Samples that cannot be read are passed over.

    Args:
        spec: As for `open_dataset`, like ``split`` and ``images``.
        limit: Most items (of each sort for ``shapes`` and ``photo-scenes``); of a file at most `FILE_ITEMS` where none is given.
        on_failed: Told the id of each sample that is passed over, and why.

    Returns:
        The items; none, with a warning, if a file has no question with a short answer.
    """
    if limit is not None and limit < 1:
        raise DataError(f"limit must be at least 1 item, got {limit}")
    name, options = _split_spec(spec)
    if name == "easy-vqa":
        return easy_vqa_evaluation(split, limit)
    if name == "photo-scenes":
        from vlm_distill_cache.data.photos.dataset import ITEMS, photo_evaluation  # drawing code, only needed here

        seed = _number(options, "seed", 0)
        return photo_evaluation(split, limit or ITEMS, seed, options.get("ground", "smooth"))
    if name == "shapes":
        from vlm_distill_cache.data.shapes.dataset import shapes_evaluation  # drawing code, only needed here
        from vlm_distill_cache.data.shapes.kinds import evaluation_of_kinds, parse_kinds

        seed, kinds = _number(options, "seed", 0), options.get("kinds")
        if kinds is None:
            return shapes_evaluation(split, limit or SHAPES_ITEMS, seed)
        return evaluation_of_kinds(split, limit or ITEMS_OF_KINDS, seed, parse_kinds(kinds))
    questions: list[Question] = []
    dataset = open_dataset(spec, split=split, images=images)
    for index, sample_id in enumerate(dataset.sample_ids):
        try:
            questions += _short_questions(dataset[index])
        except SampleError as error:
            on_failed(sample_id, str(error))
        if len(questions) >= (limit or FILE_ITEMS):
            break
    if not questions:
        logger.warning(
            "%s has no question about an image with an answer of at most %d words: exact match is not scored. "
            "Name held-out questions with --set evaluation.data=FILE (distill run) or --data (distill evaluate)",
            spec,
            SHORT_ANSWER_WORDS,
        )
    return EvaluationSet(questions=tuple(questions[: limit or FILE_ITEMS]))


def _short_questions(sample: Sample) -> list[Question]:
    if not sample.images:
        return []
    asked = questions_of(sample, _answer_kind)
    if not sample.independent_turns:
        shown = len(sample.placed()[0].places)  # what later questions show was not to be seen yet
        asked = [replace(asked[0], further=sample.images[1:shown], places=sample.turns[0].places)] if shown else []
    return [item for item in asked if item.question and len(item.answer.split()) <= SHORT_ANSWER_WORDS]


def _answer_kind(answer: str) -> str:
    """VQAv2's three answer types."""
    word = answer.strip().rstrip(".").lower()
    if word in ("yes", "no"):
        return "yes/no"
    return "number" if word.isdigit() else "other"


def _open_path(
    name: str,
    options: Mapping[str, str],
    split: str,
    images: Path | None,
    commits: Mapping[str, str] | Sequence[Mapping[str, str]],
    *,
    strict: bool = False,
) -> Dataset:
    path, kind = Path(name), Path(name).suffix.lower()
    if kind in MIXTURES and path.is_file():
        _refuse_options(name, options)
        return open_mixture(
            path, split=split, images=images, open_part=partial(open_dataset, strict=strict), commits=commits
        )
    if not isinstance(commits, Mapping):
        commits = {repository: commit for each in commits for repository, commit in each.items()}
    if kind in TEXTS and path.is_file():
        _refuse_options(name, options)
        return open_file(path, images=images)
    if not path.exists() and (web := _WEB.fullmatch(name)):
        revision, inner = web["tree"] or web["at"], web["file"] or web["inner"] or web["rest"]
        typed = f"{web['name']}{f'@{revision}' if revision else ''}{f'/{inner}' if inner else ''}"
        raise DataError(f"data {name!r} is an address; type {by_make(f'DATA={typed}', f'--data {typed}')}")
    if is_url(name) and name.partition("?")[0].lower().endswith(KINDS):
        _refuse_options(public_location(name), {key: value for key, value in options.items() if key != "streaming"})
        return open_addresses(name, images=images)
    choice = Choice(
        config=options.get("name"), split=options.get("split", split), strict="split" in options, images=images
    )
    if path.is_dir():
        if "streaming" in options:
            raise DataError(f"{name} is a folder here: there is nothing to stream, leave out streaming=")
        return _open_folder(path, choice, options)
    if kind == ".tar" and (path.exists() or _in_repository(name) is None):
        _refuse_options(name, {key: value for key, value in options.items() if key != "streaming"})
        return WebDataset(name, by_files=_flag(options, "streaming"))
    if kind == ".parquet" and (path.exists() or _in_repository(name) is None):
        _refuse_options(name, {key: value for key, value in options.items() if key != "streaming"})
        paths, by_files = find_files(name, kind), _flag(options, "streaming")
        root, sources = image_folder(images, paths[0]), [LocalParquet(p) for p in paths]
        return ParquetDataset(sources, name=path.name, where=name, image_root=root, by_files=by_files)
    if not path.exists() and (found := _in_repository(name)) is not None:
        hub, file = found
        if file is not None and (more := [key for key in ("name", "split") if key in options]):
            raise DataError(
                f"{name} is a file of a repository: it has no {' and no '.join(more)}; leave out {more[0]}="
            )
        hub = HubName(hub.repository, hub.revision or commits.get(hub.repository, ""))
        return open_name(hub, choice, file=file, streaming=_flag(options, "streaming"))
    if kind in TEXTS and is_pattern(name):
        _refuse_options(name, options)
        parts = [open_file(p, images=images) for p in find_files(name, kind)]
        return parts[0] if len(parts) == 1 else JoinedSamples(parts, name=path.name)
    near = "" if path.exists() else nearest(name, _OPTIONS) or nearest_path(path)
    state = "is of an unknown kind" if path.exists() else f"does not exist{near}"
    if re.match(r"\w+://", name):
        state = "is an address, and nothing is downloaded from there: download it"
    raise DataError(f"data {name!r} {state}; expected {FORMS}")


def _refuse_other_split(name: str, split: str, named: str | None, dataset: Dataset) -> None:
    """Refuse data opened for a held-out split that are none: what is named with them, or their name, says what they are."""
    if named is not None:
        if not says_split(named, split):
            raise DataError(f"{name}:split={named} and split={split} are given, which differ: leave out one")
    elif not says_split(dataset.split or Path(name).name, split):
        raise DataError(
            f"data {name!r} has no split {split!r}: {'its training data' if dataset.split else 'all of it'} would be read; "
            "leave split out, or name data that has it (in a mixture, give split: to the entries that have it)"
        )


def _in_repository(name: str) -> tuple[HubName, str | None] | None:
    """A repository of the hub, and a file in it or none; None for what can be neither."""
    if found := file_of_repository(name, Path()):
        return found
    hub = None if name.lower().endswith(FILE_ENDINGS) else hub_name(name)
    return None if hub is None else (hub, None)


def _open_folder(path: Path, choice: Choice, options: Mapping[str, str]) -> Dataset:
    saved = [path] if is_saved_dataset(path) else sorted(p for p in path.iterdir() if is_saved_dataset(p))
    if len(saved) == 1:
        if "name" in options:
            raise DataError(f"{path} is one data set of datasets.save_to_disk; leave out name=")
        return HuggingFaceDataset(saved[0], split=choice.split, strict=choice.strict, images=choice.images)
    if len(saved) > 1:
        raise DataError(f"{path} holds several data sets, name one: {', '.join(map(str, saved))}")
    if any(path.glob("*.tar")) and not options:
        return WebDataset(str(path))
    texts = sorted(p for p in path.iterdir() if p.suffix.lower() in (*TEXTS, *MIXTURES))
    tables = any(path.rglob("*.parquet")) or any(any(path.rglob(name)) for name in METADATA)
    if not tables and not (path / "README.md").is_file():
        # What `datasets` would make of it is every file at once; here whoever has a file beside pictures names it.
        if texts:
            raise DataError(f"{path} is a folder; name the file in it that is meant: {', '.join(map(str, texts[:5]))}")
        if not any(p.is_file() for p in path.rglob("*")):
            raise DataError(f"folder {path} holds no data set that can be read; expected {FORMS}")
    return open_folder(path, choice)


def _split_spec(spec: str) -> tuple[str, dict[str, str]]:
    """Split ``name:key=value,key=value``; a colon without a ``=`` behind it belongs to the path."""
    if (found := _SLICED.search(spec)) and not Path(spec).exists():
        raise DataError(
            f"data {spec!r}: a split is read as a whole, {found[1]} is not read; its first samples are taken by a limit "
            f"({by_make('CACHE_SET=limit=N, ')}--set limit=N, or limit: N in a mixture), "
            "several splits as entries of a mixture (.yaml)"
        )
    name, colon, rest = spec.rpartition(":")
    if not colon or "=" not in rest or "/" in rest or Path(spec).exists():
        return spec, {}
    options = {key.strip(): value.strip() for key, _, value in (pair.partition("=") for pair in rest.split(","))}
    allowed = _OPTIONS.get(name, _OF_FOLDERS)
    if unknown := sorted(set(options) - set(allowed)):
        raise DataError(f"{name} has no option {', '.join(unknown)}; it has {', '.join(allowed) or 'none'}")
    if empty := sorted(key for key, value in options.items() if not value):
        raise DataError(f"{name}: option {', '.join(empty)} has no value; write {empty[0]}=VALUE")
    if name in ("shapes", "photo-scenes"):
        for key in set(options) & {"images", "seed"}:
            _number(options, key, 0)
    return name, options


def _refuse_options(name: str, options: Mapping[str, str]) -> None:
    if options:
        raise DataError(f"{name} has no option {', '.join(sorted(options))}; folders and names of the hub have")


def _number(options: Mapping[str, str], key: str, otherwise: int) -> int:
    value = options.get(key)
    if value is None:
        return otherwise
    if not value.isdecimal() or len(value) > 18:
        raise DataError(f"option {key} must be a whole number from 0 to 10**18, got {brief(value, limit=60)!r}")
    return int(value)


def _flag(options: Mapping[str, str], key: str) -> bool:
    value = options.get(key, "false").lower()
    if value not in ("true", "false"):
        raise DataError(f"option {key} must be true or false, got {options[key]!r}")
    return value == "true"
