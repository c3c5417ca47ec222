"""Natural photographs of a user's folder for `make experiment-photos DATA=FOLDER`: captions, splits, and what is asked.

| in the folder, or in ``annotations`` | is read as |
|---|---|
| ``captions*.json`` with ``images`` and ``annotations`` | COCO's captions |
| ``captions*.txt``, ``*.token.txt`` | Flickr8k's: a picture and a caption a line, ``NAME,CAPTION`` or ``NAME#0<tab>CAPTION`` |
| any other ``captions*`` of ``.json``, ``.jsonl``, ``.csv``, ``.tsv`` | entries of the library's readers |
| none of these | what the library reads of the folder |

Pictures lie anywhere below it. Equal files are one picture, and a picture is in one split alone. Nothing of a folder is
copied: what is written beside the results names its pictures.

Which caption is a picture's is asked in three kinds. Of `OTHER` and `SIMILAR` each pair of pictures gives twins, whose captions
have equally many words: a model that sees no picture is right on one of two. Of `SWAPPED` two things change places within a
caption, of which language alone tells much: the items are chosen so that the blind teacher is right on half of them.
"""

import csv
import io
import json
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import PIL.Image
import xxhash

from tests.benchmarks.experiment_photos_scores import PICTURE, Answers, Scoring, is_twin
from vlm_distill_cache.common.errors import DataError
from vlm_distill_cache.common.files.hashing import fingerprint
from vlm_distill_cache.data.images.load import ImageFile
from vlm_distill_cache.data.registry import open_dataset
from vlm_distill_cache.data.sample import CaptionPair, EvaluationSet, iterate_readable

OTHER, SIMILAR, SWAPPED = "other_picture", "similar_picture", "swapped_words"
RIGHT_PICTURE = "right picture of two"
FOLDER = Scoring(
    {
        RIGHT_PICTURE: (PICTURE + OTHER, PICTURE + SIMILAR),
        "captions, balanced by the blind score": (OTHER, SIMILAR, SWAPPED),
    },
    RIGHT_PICTURE,
    ("right pictures of two that were drawn", (PICTURE + OTHER,)),
)
MOST = 12_000  # pictures that are looked at; of more, these by their names' hashes
FEWEST = 100
SPLITS = {"test": 0.10, "validation": 0.05, "students": 0.40, "teacher": 0.45}  # shares of the pictures
CANDIDATES = 4  # swapped captions for each that is asked: they are balanced afterwards
DIFFERENT = 2  # words of each of two captions that the other lacks, at least
_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
_BEFORE = "a an the one two three four five six several some many his her their its"
_DETERMINERS = frozenset(_BEFORE.split())
_SINGULAR = frozenset(("a", "an", "one"))
_PLAIN = (
    "a an the and or but while as who which that is are was were be being has have in on at of with from to into onto over "
    "under above below behind beside between near by through across around along against down up off out inside outside next "
    "front for it he she they his her their its there this these not very all both other another"
)
_NO_THINGS = frozenset(_PLAIN.split())
_SYMMETRIC = frozenset(
    ("and", "or", "with", "beside", "near", "next", "to", "by")
)  # both may change places around them

Captions = dict[Path, list[str]]  # by picture


@dataclass(frozen=True)
class Photographs:
    """The pictures of a folder and what is said of them.

    Attributes:
        captions: By picture, in the order of the pictures' contents: the same wherever the folder lies.
        fingerprint: Of the pictures' contents and their captions.
    """

    captions: Captions
    fingerprint: str

    def split(self, name: str) -> Captions:
        """The pictures of one of `SPLITS`; no picture is in two of them."""
        shares, pictures = list(SPLITS.values()), list(self.captions)
        place = list(SPLITS).index(name)
        first, last = (round(sum(shares[:end]) * len(pictures)) for end in (place, place + 1))
        return {picture: self.captions[picture] for picture in pictures[first:last]}


def read_photographs(folder: Path) -> Photographs:
    """Read a folder of pictures with captions.

    Raises:
        SystemExit: It holds none, or too few to learn from and to ask about.
    """
    if not folder.is_dir():
        raise SystemExit(f"DATA={folder} is no folder; name one that holds pictures and their captions")
    try:
        rows = list(_rows(folder))
    except DataError as error:
        raise SystemExit(
            f"{error}. Or give it captions*.txt, .json, .jsonl or .csv, as COCO or Flickr8k have them"
        ) from None
    paths = [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in _ENDINGS]
    places = {path.relative_to(folder).as_posix(): path for path in paths}
    called: dict[str, list[Path]] = {}
    for path in paths:
        called.setdefault(path.name, []).append(path)
    said: dict[str, list[str]] = {}
    for name, caption in rows:
        told = " ".join(caption.split()).rstrip(" .")
        if told:
            said.setdefault(name, []).append(told)
    known = sorted((name for name in said if name in places or Path(name).name in called), key=_hash)[:MOST]
    found: dict[str, tuple[Path, list[str]]] = {}  # by content
    for name in known:
        path, *others = [places[name]] if name in places else called[Path(name).name]
        if others:
            raise SystemExit(
                f"{folder}: its captions speak of {name}, and {path} and {others[0]} are called so; take away the one that is not "
                "meant, or name it in the captions by its path below the folder"
            )
        content = path.read_bytes()
        try:
            PIL.Image.open(io.BytesIO(content)).verify()
        except (OSError, SyntaxError) as error:  # as Pillow says that a file is none, or broken
            sys.stdout.write(f"{path} is passed over, it is no picture: {error}\n")
            continue
        found.setdefault(xxhash.xxh3_128_hexdigest(content), (path, []))[1].extend(said[name])
    if len(found) < FEWEST:
        raise SystemExit(
            f"{folder}: {len(found)} different pictures with captions, expected {FEWEST} or more ({len(said)} are named in its "
            f"captions, {len(paths)} lie there); put the pictures below the folder, under the names that the captions have"
        )
    ordered = {key: found[key] for key in sorted(found)}
    told = fingerprint([[key, *dict.fromkeys(captions)] for key, (_, captions) in ordered.items()])
    return Photographs({path: list(dict.fromkeys(captions)) for path, captions in ordered.values()}, told)


def _hash(name: str) -> int:
    return xxhash.xxh3_64_intdigest(name.encode())


def _rows(folder: Path) -> Iterator[tuple[str, str]]:
    """Names of pictures as they are written, each with a caption."""
    places = [folder, folder / "annotations"]
    files = sorted(path for place in places for end in ("captions*", "*.token.txt") for path in place.glob(end))
    files = [path for path in dict.fromkeys(files) if path.is_file()]
    for file in files:
        if file.suffix == ".txt":
            yield from _flickr(file)
        elif file.suffix == ".json" and (told := json.loads(file.read_text(encoding="utf-8"))) and "images" in told:
            yield from _coco(told)
        else:
            yield from _entries(str(file), folder)
    if not files:
        yield from _entries(str(folder), folder)


def _coco(told: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    names = {image["id"]: image["file_name"] for image in told["images"]}
    for said in told["annotations"]:
        yield names[said["image_id"]], said["caption"]


def _flickr(file: Path) -> Iterator[tuple[str, str]]:
    """A picture and a caption a line; quotes mean something between commas alone."""
    with file.open(encoding="utf-8", newline="") as lines:
        tabs = "\t" in lines.readline()
        lines.seek(0)
        how: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if tabs else {}
        for name, *caption in csv.reader(lines, **how):
            if caption and name.lower() != "image":
                yield name.partition("#")[0], ("\t" if tabs else ",").join(caption)


def _entries(data: str, folder: Path) -> Iterator[tuple[str, str]]:
    """Captions as the library reads them; a question's answer is none."""
    for sample in iterate_readable(open_dataset(data, images=None if data == str(folder) else folder)):
        captions = [turn.answer for turn in sample.turns if not turn.question]
        for picture in sample.images[:1]:
            if isinstance(picture, ImageFile):
                name = picture.path.relative_to(folder) if picture.path.is_relative_to(folder) else picture.path
                yield from ((name.as_posix(), caption) for caption in captions)


# What is written --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FolderData:
    """What of a folder an experiment uses, in files of its own.

    Attributes:
        place: Where the files lie.
        images: Captions that students learn from, at most; each picture's first ones come first.
        taught: The same of the teacher.
        items: Asked of each kind, an even number.
        shown: Held-out pictures of which the page shows where models look.
    """

    place: Path
    images: int
    taught: int
    items: int
    shown: int

    @property
    def students(self) -> str:
        """What students learn from, as ``data=``."""
        return str(self.place / f"students-{self.images}.jsonl")

    @property
    def teacher(self) -> str:
        """What the teacher learns from."""
        return str(self.place / f"teacher-{self.taught}.jsonl")

    @property
    def held_out(self) -> str:
        """Pictures that nothing learns from."""
        return str(self.place / f"held-out-{self.shown}.jsonl")

    @property
    def asked(self) -> Path:
        """All that may be asked, by split."""
        return self.place / f"asked-{self.items}.json"

    def write(self, photographs: Photographs) -> None:
        """Write the files; the paths in them are those of today.

        Raises:
            SystemExit: Nothing can be asked of a split.
        """
        self.place.mkdir(parents=True, exist_ok=True)
        parts = (("students", self.students, self.images), ("teacher", self.teacher, self.taught))
        for name, file, most in (*parts, ("test", self.held_out, self.shown)):
            lines = [
                json.dumps({"id": f"{path.stem}#{number}", "image": str(path.resolve()), "caption": caption})
                for number, path, caption in _in_rounds(photographs.split(name))[:most]
            ]
            Path(file).write_text("\n".join(lines) + "\n")
        asked = {split: make_pairs(photographs.split(split), self.items) for split in ("validation", "test")}
        asked["validation"] = [pair for pair in asked["validation"] if pair.kind != SWAPPED]  # balanced they are not
        stored = {
            split: [[pair.item_id, pair.image.name, pair.right, pair.wrong, pair.kind] for pair in pairs]
            for split, pairs in asked.items()
        }
        for split, pairs in asked.items():
            if {OTHER, SIMILAR} - {pair.kind for pair in pairs}:
                raise SystemExit(
                    f"the {split} split, {len(photographs.split(split))} of {len(photographs.captions)} pictures, has no two with "
                    "captions of equally many words; add pictures to the folder"
                )
        self.asked.write_text(json.dumps(stored))

    def pairs(self, split: str, chosen: Sequence[int] | None = None) -> EvaluationSet:
        """The pairs of a split at some places, of `balanced`; None: all of them."""
        stored = json.loads(self.asked.read_text())[split]
        stored = stored if chosen is None else [stored[place] for place in chosen]
        return EvaluationSet(
            pairs=tuple(
                CaptionPair(item_id=name, image=ImageFile(Path(path)), right=right, wrong=wrong, kind=kind)
                for name, path, right, wrong, kind in stored
            )
        )


def _in_rounds(captions: Captions) -> list[tuple[int, Path, str]]:
    """The first caption of every picture, then the second ones, and so on."""
    rounds = max((len(said) for said in captions.values()), default=0)
    return [
        (number, path, said[number])
        for number in range(rounds)
        for path, said in captions.items()
        if number < len(said)
    ]


def make_pairs(captions: Captions, items: int) -> list[CaptionPair]:
    """What is asked of some pictures: twins next to each other, then captions with swapped words.

    Args:
        items: Of each kind of twins, an even number; of `SWAPPED` `CANDIDATES` times as many, as far as there are.
    """
    found: list[CaptionPair] = []
    for kind in (OTHER, SIMILAR):
        generator, left = random.Random(kind), list(captions)
        generator.shuffle(left)
        made = 0
        while left and made < items:
            first = left.pop()
            twins = _twins(first, left, captions, nearest=kind == SIMILAR)
            if twins is None:
                continue
            said, second, other = twins
            left.remove(second)
            for twin, (path, right, wrong) in enumerate(((first, said, other), (second, other, said))):
                name = f"{kind}-{first.stem}-{twin}"
                found.append(CaptionPair(item_id=name, image=ImageFile(path), right=right, wrong=wrong, kind=kind))
            made += 2
    swapped = [
        CaptionPair(
            item_id=f"{SWAPPED}-{path.stem}#{number}", image=ImageFile(path), right=said, wrong=changed, kind=SWAPPED
        )
        for number, path, said in _in_rounds(captions)
        if (changed := swap_things(said)) is not None
    ]
    return found + swapped[: CANDIDATES * items]


def _twins(first: Path, others: Sequence[Path], captions: Captions, *, nearest: bool) -> tuple[str, Path, str] | None:
    """A caption of a picture, another picture and a caption of that, of equally many words.

    Args:
        nearest: Those with the most words in common; else the first that are found.
    """
    best, most = None, -1
    for second in others:
        for said in captions[first]:
            words = said.lower().split()
            for other in captions[second]:
                theirs = other.lower().split()
                if len(theirs) != len(words):
                    continue
                common = len({*words} & {*theirs})
                apart = min(len({*words}), len({*theirs})) - common
                if apart >= DIFFERENT and common > most:
                    best, most = (said, second, other), common
        if best is not None and not nearest:
            break
    return best


def swap_things(caption: str) -> str | None:
    """Let two things change places: "A dog on a red couch" becomes "A red couch on a dog".

    Returns:
        None where a caption has no two things, or nothing between them that tells which is which ("a cat and a dog").
    """
    words = caption.split()
    spans = _things([word.lower() for word in words])
    words[0] = words[0].lower() if spans[:1] and spans[0][0] == 0 else words[0]
    for (start, stop), (begin, end) in pairwise(spans):
        first, between, second = words[start:stop], words[stop:begin], words[begin:end]
        if first != second and not _SYMMETRIC.issuperset(between):
            swapped = " ".join([*words[:start], *second, *between, *first, *words[end:]])
            return swapped[0].upper() + swapped[1:] if caption[0].isupper() else swapped
    return None


def _things(words: Sequence[str]) -> list[tuple[int, int]]:
    """Where things stand: a determiner and one or two words behind it. No tagger: some are none, which only costs items."""
    found = []
    for start, word in enumerate(words):
        if word not in _DETERMINERS:
            continue
        end = start + 1
        while end < min(len(words), start + 3) and words[end].isalpha() and words[end] not in _NO_THINGS:
            verb = word in _SINGULAR and words[end].endswith("s") and not words[end].endswith("ss")  # "a dog runs"
            if verb or (words[end].endswith("ing") and end > start + 1):
                break
            end += 1
        if end > start + 1:
            found.append((start, end))
    return found


def balanced(pairs: Sequence[CaptionPair], blind: Answers, most: int) -> list[int]:
    """All twins; of the other pairs as many on which a blind model is right as on which it is wrong, its ties left out.

    Args:
        blind: Its answers to all pairs.
        most: Of each kind without twins.

    Returns:
        Their places, in order.
    """
    signs = {kind: iter(found) for kind, found in blind.items()}
    kept: list[int] = []
    alone: dict[tuple[str, str], list[int]] = {}  # by kind and sign
    for place, pair in enumerate(pairs):
        sign = next(signs[pair.kind])
        if is_twin(pairs, place):
            kept.append(place)
        else:
            alone.setdefault((pair.kind, sign), []).append(place)
    for kind in {kind for kind, _ in alone}:
        right, wrong = (alone.get((kind, sign), []) for sign in "10")
        count = min(len(right), len(wrong), most // 2)
        kept += [*right[:count], *wrong[:count]]
    return sorted(kept)
