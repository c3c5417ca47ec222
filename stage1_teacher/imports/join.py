"""Rows without an id are found by their tokens: those of a sample up to the end of its last answer."""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import xxhash

from vlm_distill_cache.common.errors import SampleError
from vlm_distill_cache.common.terminal.progress import progress
from vlm_distill_cache.data.sample import Dataset
from vlm_distill_cache.data.text.encoding import EncodedSample, SampleEncoder


class TokenJoin:
    """From a sequence of tokens to the samples that it begins with; samples with a picture are none of them."""

    def __init__(self, dataset: Dataset, encoder: SampleEncoder) -> None:
        """Of the samples of a data set; they are encoded when the first row is looked for."""
        self._dataset, self._encoder = dataset, encoder
        self._known: defaultdict[bytes, list[str]] = defaultdict(list)
        self._lengths: set[int] = set()

    def samples_of(self, tokens: Sequence[int | None]) -> list[str]:
        """The ids of the samples whose tokens, up to the end of the last answer, a sequence begins with."""
        if not self._lengths:
            self._encode_all()
        found: list[str] = []
        digest = xxhash.xxh3_128()
        longest = max(self._lengths)
        for length, token in enumerate(tokens[:longest], start=1):
            if token is None or not 0 <= token < 1 << 63:
                break
            digest.update(token.to_bytes(8, "little"))
            if length in self._lengths:
                found += self._known.get(digest.digest(), [])
        return found

    def _encode_all(self) -> None:
        self._lengths.add(0)
        with progress("read texts", total=len(self._dataset), unit="sample", keep=False) as bar:
            for position in range(len(self._dataset)):
                bar.update()
                try:
                    sample = self._dataset[position]
                    encoded = None if sample.images else self._encoder(sample)
                except SampleError:
                    continue  # is a failure with its reason when its shard is written
                if encoded is not None:
                    self._add(encoded)

    def _add(self, sample: EncodedSample) -> None:
        length = int(sample.supervised_rows[-1]) + 2
        tokens = np.ascontiguousarray(sample.input_ids[:length], dtype="<i8")
        self._known[xxhash.xxh3_128(tokens.tobytes()).digest()].append(sample.sample_id)
        self._lengths.add(length)
