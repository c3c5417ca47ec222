"""The teacher's own gaze on the pictures of held-out items, from a cache of them: what choosing visual tokens could gain.

Dims: C cells of the cached grid, B batch, M most visual tokens of a sample.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vlm_distill_cache.common.attention.tiles import Tile, tiles_of
from vlm_distill_cache.common.cache.reader import TeacherCache
from vlm_distill_cache.common.cache.schema import base_fields
from vlm_distill_cache.common.codecs.row_attention import RowAttentionCodec
from vlm_distill_cache.common.errors import CacheMismatchError, ConfigError
from vlm_distill_cache.common.models.changed import changes_of
from vlm_distill_cache.common.models.tokens.fewer_tokens import scores_given
from vlm_distill_cache.stage2_student.batches.gaze import gaze_on
from vlm_distill_cache.stage2_student.students.library import core_of


@dataclass(frozen=True, kw_only=True)
class Oracle:
    """Where a teacher looked on pictures.

    Attributes:
        place: The cache's, for errors.
        gaze: By a picture's hash (of several in a sample by their hashes, one behind the other) the mean over all answer rows
            and layer groups of all samples of it, float32 ``[C]``.
        cells: By the same, the grids of these cells.
    """

    place: str
    gaze: Mapping[bytes, NDArray[np.float32]]
    cells: Mapping[bytes, tuple[Tile, ...]]

    def scores(self, tiles: Sequence[Sequence[Tile]], hashes: Sequence[bytes]) -> Tensor:
        """The gaze on the visual tokens of a batch's samples, float32 ``[B, M]``, NaN behind each one's last.

        Raises:
            CacheMismatchError: If the cache has no gaze on a picture.
        """
        rows = []
        for own, picture in zip(tiles, hashes, strict=True):
            found = self.gaze.get(picture)
            if own and found is None:
                raise CacheMismatchError(
                    f"--oracle: {self.place} holds no teacher's gaze on a picture of an item that is scored (hash {picture.hex()}; "
                    f"it holds {len(self.gaze)} pictures). Build a cache of the items: `teacher-cache build` with the same "
                    "data and --set split=test, for one"
                )
            rows.append(
                gaze_on(torch.from_numpy(found), self.cells[picture], own)
                if own and found is not None
                else torch.zeros(0)
            )
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=float("nan"))


def read_oracle(cache: TeacherCache) -> Oracle:
    """Read a cache's gaze on each of its pictures.

    Raises:
        CacheMismatchError: If it holds none.
    """
    signal = RowAttentionCodec.signal
    if signal not in cache.plan.signals:
        raise CacheMismatchError(
            f"--oracle: {cache.place} holds no {signal}, so it does not tell where its teacher looked; it holds "
            f"{', '.join(sorted(cache.plan.signals))}. Add it (`teacher-cache extend`), or give another --cache"
        )
    codec: Any = cache.codec(signal)
    names = frozenset(entry.name for entry in (*codec.fields(), *base_fields(cache.plan.format_version)))
    sums: dict[bytes, Any] = {}
    grids: dict[bytes, tuple[Tile, ...]] = {}
    for sample_id in cache.sample_ids:
        record = cache.read(sample_id, names)
        picture, cells = np.asarray(record["image_hash"]).astype(np.uint8).tobytes(), codec.decode(record).cells
        total = cells.astype(np.float64).sum(axis=(0, 1))
        if any(picture) and total.any():
            sums[picture] = sums.get(picture, 0.0) + total
            grids[picture] = codec.cells_of(tiles_of(record))
    return Oracle(
        place=cache.place,
        gaze={picture: (total / total.sum()).astype(np.float32) for picture, total in sums.items()},
        cells=grids,
    )


_current: ContextVar[Oracle | None] = ContextVar("oracle", default=None)


@contextmanager
def followed(oracle: Oracle | None) -> Iterator[None]:
    """In the block a student that is scored feeds those visual tokens where the teacher looked."""
    before = _current.set(oracle)
    try:
        yield
    finally:
        _current.reset(before)


def oracle_scores(model: Any, tiles: Sequence[Sequence[Tile]], hashes: Sequence[bytes]) -> AbstractContextManager[Any]:
    """Around a pass over samples with these pictures: their gaze chooses, if an oracle is `followed`."""
    oracle = _current.get()
    return nullcontext() if oracle is None else scores_given(core_of(model), oracle.scores(tiles, hashes))


def refuse_no_choice(model: Any, student: str) -> None:
    """Raise a ConfigError if a student has no visual tokens to choose, or chooses without looking."""
    by = changes_of(core_of(model).config).get("visual_tokens", {}).get("by")
    if by in (None, "grid"):
        does = "feeds all visual tokens" if by is None else "feeds averages of its visual tokens (token_selection=grid)"
        raise ConfigError(
            f"--oracle: {student} {does}, so that there are none to choose by the teacher's gaze; give a student that chooses "
            "(visual_tokens and token_selection=gaze at its training, or `distill select-tokens`), or leave the option out"
        )
