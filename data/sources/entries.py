"""From an entry in any of the forms that users have to a sample; a reader only says where its parts lie."""

import logging
import posixpath
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlm_distill_cache.common.errors import SampleError
from vlm_distill_cache.common.files.hashing import fingerprint
from vlm_distill_cache.data.sample import Dataset, ImageSource, Sample, number_names
from vlm_distill_cache.data.sources.conversations import Conversation, read_conversation, unread_forms
from vlm_distill_cache.data.sources.pictures import (
    distinct,
    named_pictures,
    open_picture,
    refuse_unread,
    says_text_only,
)
from vlm_distill_cache.data.sources.rows import with_rows

logger = logging.getLogger(__name__)

PROBED = 256  # samples
SOURCE_KEYS = ("source", "data_source", "dataset")  # of an entry: which data set it was taken from
_LONGEST_KEY = 1024  # of a picture's name; a longer one is base64


class EntryDataset(Dataset):
    """Samples made of entries.

    Attributes:
        image_root: Where relative paths of pictures start.
        pictures_lie_beside: Whether pictures are files beside the entries, as in an archive.
        picture_keys: Keys that hold pictures whatever they are called, as a table's types say.
        odd_ids: What is wrong with a sample's id, by position, as `data.sample.resolve_ids` found it.
    """

    image_root: Path
    pictures_lie_beside = False
    picture_keys: frozenset[str] = frozenset()
    odd_ids: Mapping[int, str]

    @abstractmethod
    def read(self, index: int) -> Mapping[str, Any]:
        """The entry at ``index``; `SampleError` if it cannot be read."""

    def attached(self, index: int) -> Sequence[ImageSource]:
        """Pictures that lie beside the entry, not in it."""
        return ()

    def __getitem__(self, index: int) -> Sample:
        sample_id = self.sample_ids[index]
        try:
            return self._sample(index, sample_id)
        except SampleError as error:
            raise SampleError(f"sample {sample_id!r}: {error}") from error

    def image_keys(self) -> Sequence[str | None]:
        """The path of each sample's one image, as the data write it; None where only the picture tells. Reads all."""
        return [self._key(index) for index in range(len(self))]

    def sources(self) -> NDArray[np.int64]:
        """By what an entry says of it (`SOURCE_KEYS`), else by the folder of its one picture. Reads all."""
        return number_names(self._source(index) for index in range(len(self)))

    def find(self, value: Any, index: int) -> ImageSource:
        """Where a picture that the entry at ``index`` gives is to be read; `SampleError` if it cannot be."""
        return open_picture(value, self.image_root, where=f"of {self.name}, sample {self.sample_ids[index]!r}")

    def refuse_text_only(self, index: int, entry: Mapping[str, Any]) -> None:
        """Refuse a sample without a picture that speaks of one, describes one, or that all others of its kind have.

        Of entries in one file, those without a picture are text where they ask something: that is how LLaVA mixes both.
        A caption describes a picture, whether or not it says that it has none. In an archive the picture lies beside the
        text, so that it can be missing; there, only questions without the marker that all questions about pictures have
        are text, and those that say so (``"image": null``).
        """
        refuse_unread(entry)
        said = read_conversation(entry)
        if said.describes:
            raise SampleError(
                f"its {said.form!r} would be the caption of a picture, and it has none; give a text by itself as "
                "'messages', or as 'question' and 'answer'"
            )
        lacks_it = self.pictures_lie_beside and not says_text_only(entry)
        if lacks_it and self._pictured and not all(said.expected for said in self._pictured):
            raise SampleError(
                'it has no picture, though other samples of this data have one; write "image": null into its entry if it is '
                "text alone"
            )

    def tell_unread(self) -> None:
        """Say so where the first entry that can be read has several forms, of which the first alone is read."""
        for index in range(min(PROBED, len(self))):
            try:
                entry = with_rows(self.read(index))
                said = read_conversation(entry)
            except SampleError:
                continue
            if others := unread_forms(entry, said.form):
                logger.info("%s: %r is read, not %s", self.name, said.form, " or ".join(map(repr, others)))
            return

    @cached_property
    def _pictured(self) -> list[Conversation]:
        """What some samples that have a picture say, of samples spread over the data."""
        count = min(PROBED, len(self))
        found = []
        for index in sorted({place * len(self) // count for place in range(count)}):
            try:
                entry = with_rows(self.read(index))
                said = read_conversation(entry)
                if self.attached(index) or (not self.pictures_lie_beside and self._given(entry, said)):
                    found.append(said)
            except SampleError:
                continue
        return found

    def _sample(self, index: int, sample_id: str) -> Sample:
        if index in self.odd_ids:
            raise SampleError(self.odd_ids[index])
        entry = with_rows(self.read(index))
        said = read_conversation(entry)
        images = self._images(index, entry, said)
        return Sample(sample_id=sample_id, images=images, turns=said.turns, system=said.system)

    def _images(self, index: int, entry: Mapping[str, Any], said: Conversation) -> tuple[ImageSource, ...]:
        beside = self.attached(index)
        # With a picture beside it, what an entry names is another name of that picture.
        given = named_pictures(entry, plain_only=True) if beside else self._given(entry, said)
        is_beside = bool(beside) and len(given) <= len(beside)
        images = tuple(beside) if is_beside else tuple(self.find(value, index) for value in given)
        if len(images) < said.expected:
            names = "no image" if not images else f"{len(images)} image{'s' if len(images) > 1 else ''}"
            speaks = "an image" if said.expected == 1 else f"{said.expected} images"
            raise SampleError(f"the first question speaks of {speaks}, but the entry names {names}")
        if not images:
            self.refuse_text_only(index, entry)
        return images

    def _key(self, index: int) -> str | None:
        try:
            entry = with_rows(self.read(index))
            found = self._given(entry, read_conversation(entry))
        except SampleError:
            return None  # it will fail when it is asked for, wherever it stands
        if len(found) != 1 or not isinstance(found[0], str):
            return None
        return found[0] if len(found[0]) <= _LONGEST_KEY else fingerprint(found[0])

    def _source(self, index: int) -> str | None:
        try:
            entry = with_rows(self.read(index))
        except SampleError:
            return None
        if named := next((entry[key] for key in SOURCE_KEYS if isinstance(entry.get(key), str) and entry[key]), None):
            return str(named)
        picture = self._key(index)
        return None if picture is None else f"{posixpath.dirname(picture)}/"

    def _given(self, entry: Mapping[str, Any], said: Conversation) -> list[Any]:
        """The pictures that an entry gives, in its messages and beside them; the same in both places counts once."""
        named = named_pictures(entry, self.picture_keys)
        if not said.pictures or not named:
            return said.pictures or named
        return [value for values in distinct({"messages": said.pictures, "entry": named}).values() for value in values]
