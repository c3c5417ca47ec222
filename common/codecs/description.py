"""What all codecs have: settings that a cache's plan stores and that rebuild them exactly, and what makes a record sound.

A codec is a frozen dataclass that can only be built valid, so a reader repeats no settings by hand and a
damaged or newer plan is refused instead of guessed at. Codecs are numpy; `common.codecs.live` makes tensors of what they
decode.
"""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, ClassVar, Self

import numpy as np

from vlm_distill_cache.common.attention.tiles import Tile, of_view, views_of
from vlm_distill_cache.common.cache.schema import Field, Record
from vlm_distill_cache.common.errors import CacheFormatError, ConfigError
from vlm_distill_cache.common.printing import one_line

NOTHING: Mapping[str, Any] = MappingProxyType({})


class Codec(ABC):
    """How a record stores one signal; each codec is a frozen dataclass of its settings.

    Attributes:
        signal: Its name in plans, options and losses.
        of_image: Whether it says something of samples with a picture only.
        older: Settings that plans of older caches lack, and what they are there.
        infinite: Fields that may hold an infinity, and which: a mass of zero, a probability of zero.
    """

    signal: ClassVar[str]
    of_image: ClassVar[bool] = True
    older: ClassVar[Mapping[str, Any]] = NOTHING
    infinite: ClassVar[Mapping[str, float]] = NOTHING

    @abstractmethod
    def fields(self) -> tuple[Field, ...]:
        """The arrays of a record."""

    @abstractmethod
    def encode(self, live: Any) -> Record:
        """Pack a signal, numpy arrays or tensors on the CPU, into the arrays of `fields`.

        Raises:
            ValueError: If its shape or settings are not the codec's.
            SampleError: If it holds what no codec keeps: numbers that are not finite, masses below 0.
        """

    @abstractmethod
    def decode(self, record: Record) -> Any:
        """Unpack the signal of a record into numpy arrays.

        Raises:
            CacheFormatError: If its arrays do not fit each other.
        """

    def ranges(self, record: Record) -> Iterator[str]:
        """Yield numbers that no teacher has, as far as a look at single ones tells; `decode` refuses them."""
        yield from ()

    def damage(self, record: Record) -> Iterator[str]:
        """Yield what `encode` never writes, of a record whose arrays are of this codec's dtypes and shapes."""
        yield from self.ranges(record)

    def refuse_impossible(self, record: Record) -> None:
        """Refuse what `ranges` finds: the last line in front of a training step, verified or not.

        Raises:
            CacheFormatError: Naming the field, what it holds and what it could hold.
        """
        refuse_first(self.ranges(record))

    def to_dict(self) -> dict[str, Any]:
        """The exact JSON stored in a cache's plan: the signal under `codec`, then the settings."""
        settings = {name: getattr(self, name) for name in setting_names(type(self))}
        plain = {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}
        return {"codec": self.signal, **plain}

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Self:
        """Rebuild the codec from `to_dict`.

        Raises:
            CacheFormatError: If the name, the set of settings or one of their values is not what this class writes.
        """
        if stored.get("codec") != cls.signal:
            raise CacheFormatError(
                f"codec of signal {cls.signal!r}: expected codec {cls.signal!r}, got {stored.get('codec')!r}; "
                "the plan is damaged or from another version: rebuild the cache or update this software"
            )
        settings = {**cls.older, **stored}
        del settings["codec"]
        if (expected := set(setting_names(cls))) != set(settings):
            raise CacheFormatError(
                f"codec {cls.signal!r}: expected settings {sorted(expected)}, got {sorted(settings)}; "
                "the cache is from another version: rebuild it or update this software"
            )
        try:
            return cls(**{name: tuple(v) if isinstance(v, list) else v for name, v in settings.items()})
        except (ConfigError, TypeError, OverflowError) as error:
            raise CacheFormatError(f"codec {cls.signal!r}: stored settings are not valid: {error}") from error

    @classmethod
    def settings_damage(cls, stored: Mapping[str, Any]) -> Iterator[str]:
        """Yield why no codec of this class can have written these settings."""
        try:
            cls.from_dict(stored)
        except CacheFormatError as error:
            yield str(error)

    def cells_of(self, tiles: tuple[Tile, ...]) -> tuple[Tile, ...]:
        """What the arrays of an image are about, given the teacher's tiles: the tiles themselves, or cells over them."""
        return tiles

    def image_lengths(self, tiles: tuple[Tile, ...]) -> dict[str, int]:
        """Length of each array that follows from the pictures alone, by field: the sum over the views."""
        views = [of_view(tiles, view) for view in views_of(tiles)]
        cells = [sum(tile.token_count for tile in self.cells_of(view)) for view in views]
        lengths = {
            "visual": sum(cells),
            "cell": sum(cells),
            "pair": sum(size * (size + 1) // 2 for size in cells),
            "square": sum(size**2 for size in cells),
            "map": len(cells),
        }
        return {field.name: lengths[field.axis] for field in self.fields() if field.axis in lengths}


def setting_names(codec: type[Codec]) -> list[str]:
    """Names of a codec's settings, in the order in which a plan stores them."""
    return [field.name for field in dataclasses.fields(codec)]  # type: ignore[arg-type]


def refuse_first(impossible: Iterable[str]) -> None:
    """Refuse a record of which something is said; a CacheFormatError with the first of it."""
    for line in impossible:
        raise CacheFormatError(f"{line}; no teacher says so, the cache is damaged: run `cachectl verify --deep`")


def out_of_range(name: str, values: np.ndarray, low: float, high: float, *, said: str = "") -> Iterator[str]:
    """Yield that some numbers are NaN or lie outside of a range; ``said``: the range without its tolerance."""
    if values.size and not low <= values.min() <= values.max() <= high:
        yield f"{name} is {values.min()} to {values.max()}; expected {said or f'{low:g} to {high:g}'}"


def check_whole_number(name: str, value: object, low: int, high: int | None = None) -> None:
    """Refuse anything but an `int` of at least `low` and at most `high`.

    Raises:
        ConfigError: Naming the setting, the range and what was given.
    """
    at_most = f" and at most {high}" if high is not None else ""
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    if not is_whole or value < low or (high is not None and value > high):  # type: ignore[operator]
        raise ConfigError(f"{name}: expected a whole number of at least {low}{at_most}, got {shown(value)}")


def check_flag(name: str, value: object) -> None:
    """Refuse anything but a `bool`.

    Raises:
        ConfigError: Naming the setting and what was given.
    """
    if not isinstance(value, bool):
        raise ConfigError(f"{name}: expected true or false, got {shown(value)}")


def is_number(value: object) -> bool:
    """Whether a setting is a number; it may be an integer beyond any float, so compare it before anything else."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def shown(value: object) -> str:
    """A setting of unknown origin as an error prints it."""
    return one_line(repr(value), limit=40)
