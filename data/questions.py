"""What a data set asks and shows of some of its samples: for figures of a cache, which holds neither."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import PIL.Image

from vlm_distill_cache.common.errors import SampleError
from vlm_distill_cache.data.registry import open_dataset
from vlm_distill_cache.data.sample import Dataset, FrameSampling, Sample, VideoSource


@dataclass(frozen=True)
class AskedData:
    """A data set, asked by sample ids."""

    dataset: Dataset

    @cached_property
    def _places(self) -> dict[str, int]:
        return {name: place for place, name in enumerate(self.dataset.sample_ids)}

    def questions(self, sample_ids: Iterable[str]) -> dict[str, Sequence[str]]:
        """The questions of each sample's turns, in order; samples that are not there or cannot be read are left out."""
        found: dict[str, Sequence[str]] = {}
        for name in sample_ids:
            sample = self._read(name)
            if sample is not None:
                found[name] = [turn.question for turn in sample.turns]
        return found

    def pictures(self, sample_id: str, frames: Mapping[str, Any] | None = None) -> list[PIL.Image.Image] | None:
        """The pictures of a sample, the frames of its videos among them, in order.

        Args:
            frames: How the cache sampled videos (``frames`` of its plan's ``extra``); None: as `FrameSampling` does.

        Returns:
            None where there is none, or one cannot be read.
        """
        sample = self._read(sample_id)
        try:
            return None if sample is None or not sample.images else pictures_of(sample, frames)
        except SampleError:
            return None

    def _read(self, sample_id: str) -> Sample | None:
        try:
            return self.dataset[self._places[sample_id]]
        except (KeyError, SampleError):
            return None


def pictures_of(sample: Sample, frames: Mapping[str, Any] | None = None) -> list[PIL.Image.Image]:
    """The pictures of a sample, the frames of its videos among them, in order; ``frames`` as of `AskedData.pictures`.

    Raises:
        SampleError: One cannot be decoded, or ``frames`` is no sampling.
    """
    try:
        sampling = FrameSampling(**(frames or {}))
    except TypeError as error:  # a plan is somebody's file
        raise SampleError(f"frames are sampled by fps and most, the cache's plan says {frames!r}") from error
    found = (
        [frame.image for frame in medium.frames(sampling)] if isinstance(medium, VideoSource) else [medium.load()]
        for medium in sample.images
    )
    return [picture for of_medium in found for picture in of_medium]


def open_asked(spec: str, *, split: str, images: str | None) -> AskedData:
    """Open data as the stages do.

    Raises:
        DataError: Nothing can be read under that name.
    """
    return AskedData(open_dataset(spec, split=split, images=None if images is None else Path(images)))
