"""Words of the answers that the teacher's tokenizer lacks: they would be taught as its unknown token.

A tokenizer of whole words (the built-in one knows about 150) writes one token for all that it does not know. Tokenizers
that fall back on bytes never do.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from vlm_distill_cache.common.cache.plan import Plan
from vlm_distill_cache.common.cache.schema import IGNORE_INDEX
from vlm_distill_cache.common.cache.sidecar import UnknownWords, read_sidecar, sidecar_path
from vlm_distill_cache.common.errors import DataError, SampleError
from vlm_distill_cache.common.locations import by_make
from vlm_distill_cache.data.sample import Dataset
from vlm_distill_cache.data.text.encoding import EncodedSample, SampleEncoder

PROBED_SAMPLES = 1024


@dataclass(frozen=True, kw_only=True)
class UnknownToken:
    """A tokenizer's token for what it does not know.

    Attributes:
        token: Its id; None: the tokenizer has none.
        ends_answers: Whether the same token also ends answers, where it stands for no word.
        known: How many words the tokenizer knows.
    """

    token: int | None
    ends_answers: bool
    known: int

    @classmethod
    def of(cls, encoder: SampleEncoder) -> "UnknownToken":
        """What an encoder's tokenizer writes for words that it lacks."""
        token = encoder.tokenizer.unk_token_id
        ends = token is not None and token in encoder.end_token_ids
        return cls(token=None if token is None else int(token), ends_answers=ends, known=len(encoder.tokenizer))

    def count_rows(self, sample: EncodedSample) -> int:
        """Supervised rows of a sample whose target is an unknown word."""
        if self.token is None:
            return 0
        unknown, supervised = sample.labels == self.token, sample.labels != IGNORE_INDEX
        if not self.ends_answers:
            return int(unknown.sum())
        # One in each answer is its end: answers are the runs of supervised rows.
        first = supervised & ~np.append(False, supervised[:-1])
        answers = np.bincount(np.cumsum(first)[unknown]) - 1
        return int(answers.clip(min=0).sum())

    def count(self, samples: Iterable[EncodedSample]) -> UnknownWords:
        """Count the rows of a shard, as its sidecar keeps them."""
        rows = sum(map(self.count_rows, samples))
        return UnknownWords(rows=rows, token=None if self.ends_answers else self.token)


@dataclass
class UnknownBudget:
    """How large a share of the targets a cache may teach as the unknown token.

    Attributes:
        total: Samples of the whole cache.
        share: Of all targets, in [0, 1].
        samples: Counted so far, as rows and unknown ones are.
    """

    words: UnknownToken
    total: int
    share: float
    samples: int = 0
    rows: int = 0
    unknown: int = 0

    @classmethod
    def of_finished(cls, cache_dir: Path, plan: Plan, *, words: UnknownToken, share: float) -> "UnknownBudget":
        """Start from what the finished shards say: a resumed run tolerates no more."""
        budget = cls(words=words, total=plan.sample_count, share=share)
        for index in range(plan.shard_count):
            if sidecar_path(cache_dir, index).is_file():
                sidecar = read_sidecar(cache_dir, index)
                if sidecar.unknown is not None:
                    budget._add(len(sidecar.sample_ids) + len(sidecar.failed), sidecar.rows, sidecar.unknown.rows)
        return budget

    def spend(self, samples: Iterable[EncodedSample], *, failed: int) -> None:
        """Count a shard's samples before the teacher sees them.

        Args:
            failed: Samples of the shard that could not be used.

        Raises:
            DataError: When the share is exceeded, whatever the samples that are left say, as far as their number of
                targets is that of those counted.
        """
        encoded = list(samples)
        found = sum(map(self.words.count_rows, encoded))
        self._add(len(encoded) + failed, sum(len(sample.supervised_rows) for sample in encoded), found)
        self.refuse()

    def refuse(self) -> None:
        """Refuse to go on where the share is exceeded; raises as `spend` does."""
        expected = self.rows * max(self.samples, self.total) / max(1, self.samples)
        if self.unknown and self.unknown / expected > self.share:
            raise self._error(f"{self.samples} of {self.total} samples")

    def probe(self, dataset: Dataset, encoder: SampleEncoder) -> None:
        """Look at the texts of samples spread over the data, before there is anything to lose.

        Raises:
            DataError: If they exceed the share.
        """
        if self.words.token is None:
            return
        count = min(PROBED_SAMPLES, len(dataset))
        probed = replace(self)
        for position in sorted({place * len(dataset) // count for place in range(count)}):
            try:
                sample = encoder(replace(dataset[position], images=()))
            except SampleError:
                continue  # is counted, with its reason, when its shard is built
            probed._add(1, len(sample.supervised_rows), self.words.count_rows(sample))
        if probed.unknown and probed.unknown / probed.rows > self.share:
            raise probed._error("all samples" if count == len(dataset) else f"{count} samples, spread over the data,")

    def _add(self, samples: int, rows: int, unknown: int) -> None:
        self.samples += samples
        self.rows += rows
        self.unknown += unknown

    def _error(self, of: str) -> DataError:
        found = self.unknown / max(1, self.rows)
        enough = min(1.0, (int(found * 10) + 1) / 10)
        in_make = by_make('make: in CACHE_SET="..."; teacher-cache build: ')
        return DataError(
            f"{self.unknown} of {self.rows} targets ({100 * found:.1f} %) in the answers of {of} are words that the "
            f"teacher's tokenizer lacks; students would be taught its unknown token instead. Tolerated are "
            f"{100 * self.share:.4g} %; the tokenizer knows {self.words.known} tokens (the built-in one only the words "
            f"of shapes and easy-vqa). Use a teacher whose tokenizer knows the words ({by_make('TEACHER=DIR, ')}--teacher DIR), "
            f"change the answers, or go on as it is: run the same command with max_unknown_share={enough:g}, a share from 0 "
            f"to 1 ({in_make}--set max_unknown_share={enough:g})"
        )
