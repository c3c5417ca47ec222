"""From an entry in any of the forms that users have to a sample; a reader only says where its parts lie."""

import logging
import posixpath
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlm_distill_cache.common.errors import SampleError
from vlm_distill_cache.common.files.hashing import fingerprint
from vlm_distill_cache.data.sample import Dataset, ImageSource, Medium, Sample, VideoSource, number_names
from vlm_distill_cache.data.sources.conversations import Conversation, read_conversation, unread_forms
from vlm_distill_cache.data.sources.markers import Shown
from vlm_distill_cache.data.sources.pictures import (
    key_numbers,
    named_pictures,
    open_picture,
    refuse_unread,
    says_text_only,
)
from vlm_distill_cache.data.sources.rows import with_rows
from vlm_distill_cache.data.sources.showing import Given, Placed, place_media
from vlm_distill_cache.data.sources.videos import (
    Frames,
    guessed_videos,
    keys_of_videos,
    named_videos,
    open_video,
    refuse_cuts,
)

logger = logging.getLogger(__name__)

PROBED = 256  # samples
ID_KEYS = ("id", "sample_id", "question_id")  # the first that is given
SOURCE_KEYS = ("source", "data_source", "dataset")  # of an entry: which data set it was taken from
_LONGEST_KEY = 1024  # of a picture's name; a longer one is base64


def id_and_content(entry: Any) -> tuple[object, object]:
    """What `resolve_ids` asks for: the id that an entry has, and what makes one where there is none."""
    found = [entry[key] for key in ID_KEYS if entry.get(key) is not None] if isinstance(entry, dict) else []
    return (found[0] if found else None), entry


class EntryDataset(Dataset):
    """Samples made of entries.

    Attributes:
        image_root: Where relative paths of pictures start.
        pictures_lie_beside: Whether pictures are files beside the entries, as in an archive.
        picture_keys: Keys that hold pictures whatever they are called, as a table's types say.
        video_keys: Keys that hold videos, likewise.
        odd_ids: What is wrong with a sample's id, by position, as `data.sample.resolve_ids` found it.
    """

    image_root: Path
    pictures_lie_beside = False
    picture_keys: frozenset[str] = frozenset()
    video_keys: frozenset[str] = frozenset()
    odd_ids: Mapping[int, str]

    @abstractmethod
    def read(self, index: int) -> Mapping[str, Any]:
        """The entry at ``index``; `SampleError` if it cannot be read."""

    def attached(self, index: int) -> Sequence[Medium]:
        """Pictures and videos that lie beside the entry, not in it."""
        return ()

    def __getitem__(self, index: int) -> Sample:
        sample_id = self.sample_ids[index]
        try:
            return self._sample(index, sample_id)
        except SampleError as error:
            raise SampleError(f"sample {sample_id!r}: {error}") from error

    def image_keys(self) -> Sequence[str | None]:
        """The path of each sample's one image, as the data write it; None where only the picture tells. Reads all.

        Of several pictures and videos, the paths of all, a line each.
        """
        return [self._key(index) for index in range(len(self))]

    def sources(self) -> NDArray[np.int64]:
        """By what an entry says of it (`SOURCE_KEYS`), else by the folder of its one picture. Reads all."""
        return number_names(self._source(index) for index in range(len(self)))

    def find(self, value: Any, index: int, kind: str = "image") -> ImageSource:
        """Where a picture that the entry at ``index`` gives is to be read; `SampleError` if it cannot be.

        Args:
            kind: What errors call it: the file of a video is found in the same way.
        """
        where = f"of {self.name}, sample {self.sample_ids[index]!r}"
        return open_picture(value, self.image_root, where=where, kind=kind)

    def refuse_text_only(self, index: int, entry: Mapping[str, Any], said: Conversation) -> None:
        """Refuse a sample without a picture that speaks of one, describes one, or that all others of its kind have.

        Of entries in one file, those without a picture are text where they ask something: that is how LLaVA mixes both.
        A caption describes a picture, whether or not it says that it has none. In an archive the picture lies beside the
        text, so that it can be missing; there, only questions without the marker that all questions about pictures have
        are text, and those that say so (``"image": null``).
        """
        refuse_unread(entry)
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
                if self.attached(index) or (not self.pictures_lie_beside and self._shows(entry, said)):
                    found.append(said)
            except SampleError:
                continue
        return found

    def _sample(self, index: int, sample_id: str) -> Sample:
        if index in self.odd_ids:
            raise SampleError(self.odd_ids[index])
        entry = with_rows(self.read(index))
        said = read_conversation(entry)
        beside = self.attached(index)
        placed = self._placed(index, entry, said, beside)
        images = tuple(
            value
            if not isinstance(value, str) and isinstance(value, ImageSource | VideoSource)
            else self._opened(kind, value, index)
            for kind, value in placed.media
        )
        if not images:
            self.refuse_text_only(index, entry, said)
        return Sample(sample_id=sample_id, images=images, turns=placed.turns, system=said.system)

    def _placed(self, index: int, entry: Mapping[str, Any], said: Conversation, beside: Sequence[Medium]) -> Placed:
        # What lies beside an entry is what it names: other names of it are passed over.
        pictures: Sequence[Medium] = [one for one in beside if not isinstance(one, VideoSource)]
        videos: Sequence[Medium] = [one for one in beside if isinstance(one, VideoSource)]
        keys = keys_of_videos(entry, self.video_keys) if beside else []
        if videos and keys:
            refuse_cuts(entry)
        if len(videos) > 1 and keys:
            videos = self.arranged(index, videos, named_videos(entry, keys))
        elif videos and (several := next((found for key in keys if len(found := named_videos(entry, [key])) > 1), [])):
            videos = self.arranged(index, videos, several)
        elif pictures and keys and not videos:
            pictures, videos = self.moving(index, pictures, named_videos(entry, keys))
        named = named_pictures(entry, plain_only=True) if beside else []
        beside_it = pictures and (len(named) <= len(pictures) or len(set(map(str, named))) <= len(pictures))
        kinds = {*(["image"] if beside_it else []), *(["video"] if videos else [])}
        asked = tuple(
            tuple(replace(p, value=None) if isinstance(p, Shown) and p.kind in kinds else p for p in pieces)
            for pieces in said.asked
        )
        given = Given(named) if "video" in kinds else Given() if "image" in kinds else self._given(entry)
        if "image" in kinds:
            own = [p.value for pieces in said.asked for p in pieces if isinstance(p, Shown) and p.value is not None]
            given = replace(given, images=self.arranged(index, pictures, named or own))
        if "video" in kinds:
            given = replace(given, videos=videos)
        return place_media(said.turns, asked, given, form=said.form, speaks=said.speaks)

    def arranged(self, index: int, pictures: Sequence[Medium], named: Sequence[Any]) -> Sequence[Medium]:
        """The pictures beside the entry at ``index`` in the order in which it shows them, where it names them; or the videos."""
        return pictures

    def moving(self, index: int, pictures: Sequence[Medium], named: Sequence[Any]) -> tuple[list[Medium], list[Medium]]:
        """The pictures beside the entry at ``index``, without those that it calls a video or its frames; and these videos."""
        return list(pictures), []

    def _opened(self, kind: str, value: Any, index: int) -> Medium:
        if kind == "image":
            return self.find(value, index)
        return open_video(value, lambda inner, what: self.find(inner, index, what))

    def _key(self, index: int) -> str | None:
        try:
            entry = with_rows(self.read(index))
            said = read_conversation(entry)
            placed = place_media(said.turns, said.asked, self._given(entry), form=said.form, speaks=said.speaks)
        except SampleError:
            return None  # it will fail when it is asked for, wherever it stands
        found = [
            name for _, value in placed.media for name in (value.pictures if isinstance(value, Frames) else [value])
        ]
        if not found or not all(isinstance(name, str) for name in found):
            return None
        key = "\n".join(found)
        return key if len(key) <= _LONGEST_KEY else fingerprint(key)

    def _source(self, index: int) -> str | None:
        try:
            entry = with_rows(self.read(index))
        except SampleError:
            return None
        if named := next((entry[key] for key in SOURCE_KEYS if isinstance(entry.get(key), str) and entry[key]), None):
            return str(named)
        picture = self._key(index)
        return None if picture is None else f"{posixpath.dirname(picture)}/"

    def _given(self, entry: Mapping[str, Any]) -> Given:
        """The pictures and videos that an entry gives beside its messages."""
        keys = keys_of_videos(entry, self.video_keys)
        images = named_pictures(entry, self.picture_keys, video_keys=keys)
        videos = named_videos(entry, keys) if images or keys else guessed_videos(entry)
        return Given(images, videos, key_numbers(entry))

    def _shows(self, entry: Mapping[str, Any], said: Conversation) -> bool:
        """Whether an entry gives a picture or a video, in its messages or beside them."""
        given = self._given(entry)
        own = (p.value for pieces in said.asked for p in pieces if isinstance(p, Shown))
        return bool(given.images or given.videos) or any(value is not None for value in own)
