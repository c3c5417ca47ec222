"""What a sealed cache holds already, while it is topped up: records that get further signals, or stay as they are."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from vlm_distill_cache.common.cache.reader import TeacherCache
from vlm_distill_cache.common.cache.schema import Field, Record
from vlm_distill_cache.common.codecs.answers import AnswersCodec
from vlm_distill_cache.common.errors import CacheMismatchError
from vlm_distill_cache.common.pixels import HASH_BYTES
from vlm_distill_cache.common.tools.lift import lift_record
from vlm_distill_cache.data.text.encoding import EncodedSample

_REMEDY = (
    "give the data and pictures that the cache was built from (--data, --images), or build another cache; nothing was "
    "changed in this one"
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Kept:
    """The records of a cache, each of which stays byte for byte, in the format version that is built.

    Attributes:
        missing: The signals that they lack.
        fields: Their fields that stay, as the plan that is built describes them.
    """

    cache: TeacherCache
    missing: frozenset[str]
    fields: tuple[Field, ...]

    def holds(self, sample_id: str) -> bool:
        """Whether the sample has a record; one that failed has none."""
        return sample_id in self.cache

    def record(self, sample_id: str) -> Record:
        """What stays of a record, its image's arrays included."""
        names = {field.name for field in self.fields} & {field.name for field in self.cache.fields}
        return lift_record(self.cache.read(sample_id, names), self.fields)

    def answers(self, sample_id: str) -> list[str]:
        """The answers that the teacher wrote, where it did; none of a sample without a record."""
        if not self.holds(sample_id):
            return []
        return list(self.cache.decode(AnswersCodec.signal, self.cache.read(sample_id, {"answer_text"})))

    def refuse_others(self, samples: Iterable[EncodedSample], failed: Iterable[tuple[str, str]]) -> None:
        """Refuse data that are not those of the records any more.

        Args:
            samples: As they are read now.
            failed: Samples that cannot be read, with reasons.

        Raises:
            CacheMismatchError: Naming the sample and what differs.
        """
        for sample_id, reason in failed:
            if self.holds(sample_id):
                raise CacheMismatchError(
                    f"{self.cache.place}: sample {sample_id!r} has a record, and cannot be read any more: {reason}; {_REMEDY}"
                )
        for sample in samples:
            if not self.holds(sample.sample_id):
                continue
            names = {"image_hash", "labels", "frame_times"} & {field.name for field in self.cache.fields}
            record = self.cache.read(sample.sample_id, names)
            there, here = record["image_hash"].tobytes() or bytes(HASH_BYTES), sample.image_hash
            if there != here:
                raise self._other(sample.sample_id, "another picture", there.hex(), here.hex())
            times = np.array(sample.frame_times, "<f4").reshape(-1, 2)
            if not np.array_equal(kept := record.get("frame_times", times), times, equal_nan=True):
                raise self._other(
                    sample.sample_id,
                    "other frames of its videos",
                    *(str(seen[:, 1].tolist()) for seen in (kept, times)),
                )
            labels = sample.labels[sample.supervised_rows]
            if not np.array_equal(labels, record["labels"]):
                shown = (f"{len(ids)} tokens {ids[:8].tolist()}" for ids in (record["labels"], labels))
                raise self._other(sample.sample_id, "another answer", *shown)

    def _other(self, sample_id: str, what: str, there: str, here: str) -> CacheMismatchError:
        return CacheMismatchError(
            f"{self.cache.place}: sample {sample_id!r} has {what} in the data than in its record: expected {there}, got "
            f"{here}; {_REMEDY}"
        )
