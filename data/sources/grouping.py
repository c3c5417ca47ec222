"""Conversations about one image beside each other: the order of a cache that keeps signals of the image alone.

Such signals are stored once per image within a shard (``common.cache.shared_images``), and published mixes scatter
the conversations about an image over the whole file. Stage one therefore reads samples in the order in which
their *images* first appear; only an image whose conversations lie on both sides of a shard's end is kept twice.
Students join a cache by sample id, so the order is the cache's own affair.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlm_distill_cache.common.files.hashing import checksum, fingerprint
from vlm_distill_cache.data.sample import Dataset, Picked, Same, Sample, Survey, Weighting, number_names
from vlm_distill_cache.data.sources.kept.ids import JoinedIds, tell_apart
from vlm_distill_cache.data.sources.kept.surveys import survey_of_several


class ChosenSamples(Dataset):
    """Some samples of a data set, by their positions in it; none is read before it is asked for."""

    def __init__(self, dataset: Dataset, positions: Sequence[int], *, name: str) -> None:
        self.name = name
        self.origin = dataset.origin
        self._dataset, self._positions = dataset, positions
        self.sample_ids: Sequence[str] = Picked(dataset.sample_ids, positions)

    def __getitem__(self, index: int) -> Sample:
        return self._dataset[self._positions[index]]

    def made_of(self) -> Any:
        """What the data set is made of, and which samples they are."""
        of = self._dataset.made_of()
        return None if of is None else [of, checksum(np.asarray(self._positions, dtype=np.int64).data)]

    def survey(self) -> Survey:
        """As of all data; of many samples what was found once is kept."""
        return survey_of_several(self)

    def image_keys(self) -> Sequence[str | None]:
        """Names of these samples' images."""
        keys = self._dataset.image_keys()
        if isinstance(keys, Same):
            return Same(keys.value, len(self))
        return [keys[position] for position in self._positions]

    def sources(self) -> NDArray[np.int64]:
        """Where these samples are from."""
        return self._dataset.sources()[np.asarray(self._positions, dtype=np.int64)]

    def weighting(self) -> Weighting | None:
        """How often these samples are seen."""
        weighting = self._dataset.weighting()
        return None if weighting is None else weighting.of(np.asarray(self._positions, dtype=np.int64))


class JoinedSamples(Dataset):
    """Several data sets as one, in any order of their samples that keeps the order of each.

    Attributes:
        parts: Which data set each sample comes from, int64 ``[n]``.
    """

    def __init__(
        self,
        datasets: Sequence[Dataset],
        *,
        name: str,
        names: Sequence[str] | None = None,
        order: NDArray[np.int64] | None = None,
    ) -> None:
        """Join; no sample is read.

        Args:
            names: Of each data set: an id that several have gets it in front, in each of them. None: repeats are numbered.
            order: Positions in all samples, one data set after another, those of each data set rising; None: as they stand.
        """
        self.name = name
        self._datasets = list(datasets)
        self._how = [names, order is not None and checksum(order.data)]
        sizes = [len(dataset) for dataset in self._datasets]
        owners = np.repeat(np.arange(len(sizes)), sizes)
        order = np.arange(len(owners)) if order is None else order
        self.parts: NDArray[np.int64] = owners[order]
        self._places: NDArray[np.int64] = order - np.cumsum([0, *sizes])[self.parts]
        ids = tell_apart([dataset.sample_ids for dataset in self._datasets], names)
        self.sample_ids: Sequence[str] = JoinedIds(ids, self.parts, self._places)

    def __getitem__(self, index: int) -> Sample:
        part, place = int(self.parts[index]), int(self._places[index])
        return replace(self._datasets[part][place], sample_id=self.sample_ids[index])

    def made_of(self) -> Any:
        """What the data sets are made of, and how they are joined."""
        parts = [dataset.made_of() for dataset in self._datasets]
        return None if None in parts else ["joined", self._how, parts]

    def survey(self) -> Survey:
        """As of all data; of many samples what was found once is kept."""
        return survey_of_several(self)

    def image_keys(self) -> Sequence[str | None]:
        """Names of the samples' images, each with the number of its data set: two may call theirs alike."""
        keys = [dataset.image_keys() for dataset in self._datasets]
        found = [
            (part, keys[part][place]) for part, place in zip(self.parts.tolist(), self._places.tolist(), strict=True)
        ]
        return [None if key is None else f"{part}:{key}" for part, key in found]

    def sources(self) -> NDArray[np.int64]:
        """Those of each data set, told from those of the others."""
        inner = [dataset.sources() for dataset in self._datasets]
        pairs = zip(self.parts.tolist(), self._places.tolist(), strict=True)
        return number_names((part, int(inner[part][place])) for part, place in pairs)


class GroupedByImage(ChosenSamples):
    """All samples of a data set, ordered by the first appearance of their image; otherwise in their own order.

    Its fingerprint is that of the data set itself: which samples there are, whatever the order they are read in.
    """

    @property
    def ungrouped(self) -> Dataset:
        """The data set itself, in its own order."""
        return self._dataset

    def survey(self) -> Survey:
        """The data set's own."""
        return self._dataset.survey()

    def describe(self) -> dict[str, Any]:
        """What a plan records of the order: a run that would read in another one must not go on with a cache.

        The images' names decide the order and are not part of the data's fingerprint.
        """
        return {"by": "image", "fingerprint": fingerprint(list(self.sample_ids))}


def group_by_image(dataset: Dataset) -> Dataset:
    """Bring the samples of each image together.

    Returns:
        A `GroupedByImage`, or the data set itself if that changes nothing: it cannot name its images, or their
        samples are beside each other already.
    """
    keys = dataset.image_keys()
    if isinstance(keys, Same):  # of many millions, none is to be looked at
        return dataset
    groups: dict[str | int, list[int]] = {}
    for position, key in enumerate(keys):
        groups.setdefault(position if key is None else key, []).append(position)
    order = [position for group in groups.values() for position in group]
    return dataset if order == list(range(len(order))) else GroupedByImage(dataset, order, name=dataset.name)
