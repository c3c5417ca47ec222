"""What a data set hands out: samples (pictures, videos, and conversations about them) and evaluation items.

Readers differ only in where the bytes lie. Everything behind them (templates, encoding, both
stages) sees `Sample` and nothing else, so that a new format is one file here. Images stay closed
until they are encoded: a list of 665k samples costs text, not pixels.
"""

import json
import logging
import math
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from typing import Any, NamedTuple, Protocol, TypeVar, overload, runtime_checkable

import numpy as np
import PIL.Image
import xxhash
from numpy.typing import NDArray

from vlm_distill_cache.common.errors import ConfigError, DataError, SampleError

logger = logging.getLogger(__name__)

T = TypeVar("T")
SURVEYED = 64  # samples at a time
MAX_ID_BYTES = 4096  # as the stores allow


class Values(Sequence[T]):
    """A sequence whose values are made when they are asked for; equal to any other, a list too, that holds the same."""

    @abstractmethod
    def at(self, index: int) -> T:
        """The value at ``index``, 0 or more and below the length."""

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        places = range(len(self))[index]
        return self.at(places) if isinstance(places, int) else [self.at(place) for place in places]

    def index(self, value: Any, start: int = 0, stop: int | None = None) -> int:
        """The position of the first one that is equal, from ``start`` on and before ``stop``; ValueError: none is."""
        within = range(len(self))[start:stop]
        for place, one in enumerate(islice(self, within.start, within.stop), start=within.start):
            if one == value:
                return place
        raise ValueError(f"{value!r} is not there")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str):
            return NotImplemented
        return len(self) == len(other) and all(one == two for one, two in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]


class Same(Values[T]):
    """One value many times, which takes no memory."""

    def __init__(self, value: T, count: int) -> None:
        self.value, self._count = value, count

    def __len__(self) -> int:
        return self._count

    def at(self, index: int) -> T:
        """The value."""
        return self.value


class Picked(Values[T]):
    """Some values of a sequence, by their positions in it; none is copied."""

    def __init__(self, values: Sequence[T], positions: Sequence[int] | NDArray[np.int64]) -> None:
        self._values, self._positions = values, positions

    def __len__(self) -> int:
        return len(self._positions)

    def at(self, index: int) -> T:
        """That value."""
        return self._values[int(self._positions[index])]


@runtime_checkable
class ImageSource(Protocol):
    """Where an image's bytes are; opened only when the sample is encoded."""

    @property
    def name(self) -> str:
        """Path or description that error messages name."""
        ...

    def load(self) -> PIL.Image.Image:
        """Decode to RGB with the EXIF orientation applied; `SampleError` if that fails."""
        ...


@dataclass(frozen=True, kw_only=True)
class Frame:
    """One frame of a video.

    Attributes:
        image: RGB, upright.
        time: Seconds since the video began, 0 or more, rising.
    """

    image: PIL.Image.Image
    time: float


@dataclass(frozen=True, kw_only=True)
class FrameSampling:
    """Which frames of a video are read; a cache's plan records it. `data.images.sampling` has the rule.

    Attributes:
        fps: Frames a second, above 0; of a video that has fewer, all.
        most: Where that would be more frames than this, so many at uniform times instead; at least 1.

    Raises:
        ConfigError: A value is out of range.
    """

    fps: float = 1.0
    most: int = 32

    def __post_init__(self) -> None:
        if isinstance(self.fps, bool) or not isinstance(self.fps, int | float) or not 0 < self.fps < math.inf:
            raise ConfigError(f"fps: expected frames a second, a number above 0, got {self.fps!r}")
        if isinstance(self.most, bool) or not isinstance(self.most, int) or self.most < 1:
            raise ConfigError(f"most: expected the number of frames of a video, 1 or more, got {self.most!r}")


@runtime_checkable
class VideoSource(Protocol):
    """Where a video's bytes are; opened only when the sample is encoded."""

    @property
    def name(self) -> str:
        """Path or description that error messages name."""
        ...

    def frames(self, sampling: FrameSampling) -> Sequence[Frame]:
        """Decode the frames that are read, at least one; `SampleError` if that fails."""
        ...


Medium = ImageSource | VideoSource


@runtime_checkable
class DigestedImage(ImageSource, Protocol):
    """An image whose bytes can be told from others' without decoding them."""

    def digest(self) -> str | None:
        """Hash of all that is decoded, 32 hex digits; None: it cannot be told. `SampleError` or OSError: nor be read."""
        ...


@runtime_checkable
class DigestedVideo(VideoSource, Protocol):
    """A video whose bytes can be told from others' without decoding them."""

    def digest_of(self, sampling: FrameSampling) -> str | None:
        """Hash of all that is decoded of it; as of `DigestedImage.digest`."""
        ...


def load_picture(medium: Medium) -> PIL.Image.Image:
    """A picture, or one frame from the middle of a video, to look at; `SampleError` if it cannot be decoded."""
    return medium.load() if isinstance(medium, ImageSource) else medium.frames(FrameSampling(most=1))[0].image


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One question with its answer; an empty question makes the answer a caption.

    Attributes:
        places: Where in the question the next of the sample's pictures and videos stand: the number of characters in front
            of each, rising or equal. Empty of all turns: they stand in front of the first question.
    """

    question: str
    answer: str
    places: tuple[int, ...] = ()

    def parts(self) -> tuple[str | None, ...]:
        """The question's texts, and None for each picture or video between them.

        Outer white space is taken off, that between pictures in front and the first word too; inside the text it stays.
        """
        bounds = [0, *self.places, len(self.question)]
        found: list[str | None] = []
        leads = True
        for number, (start, end) in enumerate(pairwise(bounds)):
            text = self.question[start:end]
            text = text.lstrip() if leads else text
            text = text.rstrip() if number == len(self.places) else text
            found += ([None] if number else []) + ([text] if text else [])
            leads = leads and not text
        return tuple(found) or ("",)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One unit of the cache: pictures and videos, if any, and what is said about them.

    Attributes:
        sample_id: Unique within its data set; the cache is joined by it.
        images: Pictures and videos in the order in which the turns show them; empty: text only.
        turns: At least one. Their `places` are as many as `images`, or none (all in front of the first question).
        independent_turns: The turns are separate conversations about the same images, which stand in front. They are
            packed behind one shared image prefix with a block-diagonal mask, so that none can
            read another's answer.
        system: The system prompt, the same for each conversation; empty: the prompt template's own, or none.
    """

    sample_id: str
    images: tuple[Medium, ...]
    turns: tuple[Turn, ...]
    independent_turns: bool = False
    system: str = ""

    @property
    def videos(self) -> tuple[int, ...]:
        """Which of the `images` are videos."""
        # What `isinstance(medium, VideoSource)` looks for, in a tenth of its time.
        return tuple(number for number, medium in enumerate(self.images) if hasattr(medium, "frames"))

    def placed(self) -> tuple[Turn, ...]:
        """The turns, each with the places of what it shows.

        Raises:
            SampleError: The turns show another number of pictures than there are, or one outside their text.
        """
        shown = sum(len(turn.places) for turn in self.turns)
        if not shown and self.turns:
            return (replace(self.turns[0], places=(0,) * len(self.images)), *self.turns[1:])
        if shown != len(self.images):
            raise SampleError(
                f"its questions show {shown} pictures, but it has {len(self.images)}; give one for each marker"
            )
        for number, turn in enumerate(self.turns, start=1):
            if list(turn.places) != sorted(turn.places) or not all(
                0 <= place <= len(turn.question) for place in turn.places
            ):
                raise SampleError(f"turn {number} shows pictures at {turn.places}, outside of its question")
        return self.turns


def with_answers(sample: Sample, answers: Sequence[str]) -> Sample:
    """The same pictures and questions with other answers, one a turn.

    Raises:
        SampleError: If their number is another than the sample's turns'.
    """
    if len(answers) != len(sample.turns):
        raise SampleError(
            f"sample {sample.sample_id!r} has {len(sample.turns)} turns, but {len(answers)} answers were written; "
            "the data set changed since: build the cache again"
        )
    turns = tuple(replace(turn, answer=answer) for turn, answer in zip(sample.turns, answers, strict=True))
    return replace(sample, turns=turns)


class Dataset(Protocol):
    """A finite, randomly accessible, picklable list of samples in a fixed order.

    Attributes:
        name: What reports call this data set.
        sample_ids: Unique ids in order; known without opening an image.
        origin: What a cache's plan records of where the data came from, JSON; empty for files of this machine.
        split: Which split of its data this is; None where nothing but perhaps its name tells.
    """

    name: str
    sample_ids: Sequence[str]
    origin: Mapping[str, Any] = {}
    split: str | None = None

    def __len__(self) -> int:
        return len(self.sample_ids)

    def __getitem__(self, index: int) -> Sample:
        """The sample at ``index``; `SampleError` if this one cannot be understood."""
        ...

    def image_keys(self) -> Sequence[str | None]:
        """A name of each sample's image, told without opening it; None without one, or where only the picture tells."""
        return Same(None, len(self))

    def sources(self) -> NDArray[np.int64]:
        """Which source each sample is from, numbers in any order, int64 ``[n]``: a random share takes of each alike."""
        return np.zeros(len(self), dtype=np.int64)

    def weighting(self) -> "Weighting | None":
        """How often stage two sees each sample in an epoch; None: once."""
        return None

    def made_of(self) -> Any:
        """What tells all that its samples say from what others say, JSON: files' names, sizes, times; None: only a look does."""
        return None

    def survey(self) -> "Survey":
        """What a look at every sample, without opening a picture, says of all of them."""
        return survey_samples(self)

    def fingerprint(self) -> str:
        """Hash of ids, turns and system prompts; images are hashed one by one when they are encoded."""
        return self.survey().fingerprint


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What a data set holds.

    Attributes:
        fingerprint: Hash of ids, turns and system prompts.
        most_pictures: Of a sample: pictures and videos.
        videos: Samples with a video.
        fullest: Id of the sample with the most videos, of these of the one with the most pictures; "": none has any.
    """

    fingerprint: str
    most_pictures: int = 0
    videos: int = 0
    fullest: str = ""

    @property
    def several(self) -> bool:
        """Whether a cache of it needs records of several pictures: format version 2."""
        return self.most_pictures > 1 or self.videos > 0


@dataclass(frozen=True, eq=False)
class Weighting:
    """How often samples are seen in an epoch: as often as their part of a mixture says.

    Attributes:
        parts: Which part each sample belongs to, int64 ``[n]``.
        weights: Of each part, above 0; of a fraction a fixed part of the samples is seen once more.
    """

    parts: NDArray[np.int64]
    weights: Sequence[float]

    def of(self, positions: NDArray[np.int64]) -> "Weighting":
        """The same for the samples at some positions."""
        return Weighting(self.parts[positions], self.weights)

    def repeats(self, seed: int) -> NDArray[np.int64]:
        """How often each sample is seen in every epoch, int64 ``[n]``; a part that has samples is never left out."""
        found = np.zeros(len(self.parts), dtype=np.int64)
        for part, weight in enumerate(self.weights):
            places = np.flatnonzero(self.parts == part)
            whole = math.floor(weight)
            more = round((weight - whole) * len(places))
            chosen = np.random.default_rng([seed, part]).permutation(places)[: max(more, whole == 0)]
            found[places] = whole
            found[chosen] += 1
        return found


@dataclass(frozen=True, kw_only=True)
class CaptionPair:
    """A two-caption item: which caption describes the image? ``kind`` groups the report's rows."""

    item_id: str
    image: ImageSource
    right: str
    wrong: str
    kind: str


@dataclass(frozen=True, kw_only=True)
class Question:
    """A short-answer item scored by exact match; ``kind`` groups the report's rows, ``system`` is as a sample's.

    Attributes:
        image: The first of what is asked about.
        further: More of it, in order.
        places: As a turn's.
    """

    item_id: str
    image: Medium
    question: str
    answer: str
    kind: str
    system: str = ""
    further: tuple[Medium, ...] = ()
    places: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class EvaluationSet:
    """Items held out from training; either part may be empty."""

    pairs: tuple[CaptionPair, ...] = ()
    questions: tuple[Question, ...] = ()


def questions_of(sample: Sample, kind: Callable[[str], str]) -> list[Question]:
    """Every turn of a sample with an image as an item; its kind follows from the answer."""
    return [
        Question(
            item_id=f"{sample.sample_id}-{number}",
            image=sample.images[0],
            further=sample.images[1:],
            # Of a turn that shows only some of them they all stand in front.
            places=turn.places if len(turn.places) == len(sample.images) else (),
            question=turn.question,
            answer=turn.answer,
            kind=kind(turn.answer),
            system=sample.system,
        )
        for number, turn in enumerate(sample.turns)
    ]


def iterate_readable(dataset: Dataset) -> Iterator[Sample]:
    """Yield the samples in order, passing over those that raise `SampleError`."""
    for index in range(len(dataset)):
        try:
            sample = dataset[index]
        except SampleError:
            continue
        yield sample


def fingerprint_samples(dataset: Dataset) -> str:
    """The fingerprint of `survey_samples`."""
    return survey_samples(dataset).fingerprint


def survey_samples(dataset: Dataset) -> Survey:
    """Hash ids, turns and system prompts of every sample, in order, and count pictures, in one pass.

    A sample that cannot be read counts by its id.
    Streams, so that a large data set needs no second copy in memory. The image is left out on
    purpose: moving an image folder must not invalidate a cache, and a changed picture is caught
    by its own hash.
    """
    return join_surveys(survey_some(dataset, places) for places in surveyed_together(len(dataset)))


def surveyed_together(count: int) -> list[range]:
    """The positions of samples that are looked at before their parts of the survey are joined."""
    return [range(start, min(start + SURVEYED, count)) for start in range(0, count, SURVEYED)]


class SurveyPart(NamedTuple):
    """What a look at some samples beside each other says.

    Attributes:
        lines: What of them is hashed, a line of JSON each.
        most: Videos and pictures of the sample that has the most, and its id.
    """

    lines: bytes
    most_pictures: int
    videos: int
    most: tuple[tuple[int, int], str]


def survey_some(dataset: Dataset, positions: range) -> SurveyPart:
    """Look at some samples, in order."""
    lines, most_pictures, videos = bytearray(), 0, 0
    fullest, most = "", (0, 0)
    for index in positions:
        sample_id = dataset.sample_ids[index]
        entry: list[object] = [sample_id]
        try:
            sample = dataset[index]
        except SampleError:
            entry.append("unreadable")
        else:
            entry += [len(sample.images), sample.independent_turns]
            entry += [[turn.question, turn.answer, *turn.places] for turn in sample.turns]
            entry += [{"system": sample.system}] if sample.system else []
            moving = sample.videos
            entry += [{"videos": moving}] if moving else []
            most_pictures, videos = max(most_pictures, len(sample.images)), videos + bool(moving)
            shown = (len(moving), len(sample.images))
            fullest, most = (sample_id, shown) if shown > most else (fullest, most)
        lines += json.dumps(entry, ensure_ascii=True, separators=(",", ":")).encode() + b"\n"
    return SurveyPart(bytes(lines), most_pictures, videos, (most, fullest))


def join_surveys(parts: Iterable[SurveyPart]) -> Survey:
    """The survey of samples of which parts were looked at, in order."""
    digest, most_pictures, videos = xxhash.xxh3_128(), 0, 0
    fullest, most = "", (0, 0)
    for part in parts:
        digest.update(part.lines)
        most_pictures, videos = max(most_pictures, part.most_pictures), videos + part.videos
        most, fullest = part.most if part.most[0] > most else (most, fullest)
    return Survey(fingerprint=digest.hexdigest(), most_pictures=most_pictures, videos=videos, fullest=fullest)


def number_names(names: Iterable[object]) -> NDArray[np.int64]:
    """A number for each name, equal where names are, int64 ``[n]``."""
    known: dict[object, int] = {}
    return np.array([known.setdefault(name, len(known)) for name in names], dtype=np.int64)


def derive_id(content: object) -> str:
    """Make an id for an entry that has none: ``auto-`` and a hash of its JSON, stable when entries move."""
    text = json.dumps(content, sort_keys=True, ensure_ascii=True, separators=(",", ":"), default=str)
    return f"auto-{xxhash.xxh3_64_hexdigest(text.encode())}"


def number_repeats(ids: Sequence[str]) -> list[str]:
    """Make ids unique by occurrence: ``a, b, a`` becomes ``a, b, a#2`` (or the next number that is free)."""
    taken, seen = set(ids), Counter[str]()
    if len(taken) == len(ids):
        return list(ids)
    unique = []
    for sample_id in ids:
        seen[sample_id] += 1
        numbered = sample_id
        while seen[sample_id] > 1 and numbered in taken:
            numbered = f"{sample_id}#{seen[sample_id]}"
            seen[sample_id] += numbered in taken
        taken.add(numbered)
        unique.append(numbered)
    return unique


def resolve_ids(entries: Iterable[tuple[object, object]], *, where: str) -> tuple[list[str], dict[int, str]]:
    """Turn the ids found in a file into unique strings.

    Published LLaVA files repeat the image's id for each conversation about it: repeats are numbered, and said.

    Args:
        entries: ``(id or None, content)`` in file order; the content makes an id where there is none.
        where: File named in messages.

    Returns:
        The ids; and what is wrong with an id, by position: that sample has a derived one and cannot be used.
    """
    found: list[str] = []
    odd: dict[int, str] = {}
    for position, (raw, content) in enumerate(entries):
        if isinstance(raw, bool) or not isinstance(raw, str | int | None):
            odd[position] = (
                f"its id is of type {type(raw).__name__} ({str(raw)[:60]!r}); use a text or an integer, or none"
            )
        found.append(derive_id(content) if raw is None or raw == "" or position in odd else str(raw))
    unique = number_repeats(found)
    repeats = sum(before != after for before, after in zip(found, unique, strict=True))
    if repeats:
        logger.info("%s: %d repeated ids were numbered (the second 'x' becomes 'x#2')", where, repeats)
    usable, unusable = usable_ids(unique)
    return usable, odd | unusable


def usable_ids(ids: Sequence[str]) -> tuple[list[str], dict[int, str]]:
    """Replace ids that no store could keep; what is wrong with them, by position, as `resolve_ids` returns it."""
    usable, odd = list(ids), {}
    for position, sample_id in enumerate(ids):
        try:
            size = len(sample_id.encode())
        except UnicodeEncodeError as error:
            odd[position] = f"its id {sample_id[:60]!r} holds a lone surrogate ({error.reason}); use plain text"
        else:
            if size <= MAX_ID_BYTES:
                continue
            odd[position] = (
                f"its id {sample_id[:60]!r}... has {size} bytes, more than {MAX_ID_BYTES}; use a shorter one"
            )
        usable[position] = derive_id(sample_id)
    return usable, odd


def refuse_repeats(ids: list[str], *, where: str) -> list[str]:
    """Return ``ids`` unchanged if no id occurs twice.

    Raises:
        DataError: Names up to five repeated ids and how to go on.
    """
    repeated = [sample_id for sample_id, count in Counter(ids).items() if count > 1]
    if repeated:
        shown = ", ".join(repr(sample_id[:100]) for sample_id in repeated[:5])
        more = f" and {len(repeated) - 5} more" if len(repeated) > 5 else ""
        raise DataError(f"{where}: {len(repeated)} ids occur more than once: {shown}{more}; make the ids unique")
    return ids
