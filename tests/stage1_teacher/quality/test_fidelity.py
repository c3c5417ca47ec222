"""The fidelity card counts only samples in which there is something to compare."""

import pytest
import torch

from vlm_distill_cache.common.attention.tiles import Tile
from vlm_distill_cache.common.codecs.live import RowAttention
from vlm_distill_cache.common.codecs.row_attention import RowAttentionCodec
from vlm_distill_cache.common.codecs.visual_map import VisualColumnsCodec
from vlm_distill_cache.stage1_teacher.quality import fidelity
from vlm_distill_cache.stage1_teacher.quality.fidelity import Found, Seen, Totals

CODECS = {
    "answer_attention": RowAttentionCodec(grid=(2, 2), groups=1, exact=True),
    "visual_columns": VisualColumnsCodec(groups=1, exact=True),
}
SEEN, PADDING = (Tile(2, 2, (0.0, 0.0, 1.0, 1.0)),), (Tile(2, 2, (0.0, -50.0, 1.0, 51.0)),)


def compare(totals: Totals, cells: torch.Tensor, tiles: tuple[Tile, ...]) -> None:
    """Compare a sample of three rows and four visual tokens with a cache that holds exactly it."""
    columns = torch.full((1, 4), 0.25 if tiles is SEEN else 0.0)
    found = Found({}, {"answer_attention": cells, "visual_columns": columns})
    record = CODECS["answer_attention"].encode(RowAttention.from_cells(cells))
    record |= CODECS["visual_columns"].encode(columns)
    totals.samples += 1
    for codec in CODECS.values():
        fidelity.compare(codec, Seen(record, tiles, found, found, totals))


def test_samples_without_attention_on_the_picture_do_not_count_as_errors():
    """A strip padded to a square: all of its tokens are mostly padding, and the cosine of 0 and 0 is 0."""
    totals = Totals()
    compare(totals, torch.rand(3, 1, 4).softmax(-1) * 0.5, SEEN)
    compare(totals, torch.zeros(3, 1, 4), PADDING)
    assert totals.samples == 2
    means = totals.means()
    for name in ("answer_attention_gradient_cosine", "control_answer_attention_gradient_cosine"):
        assert means[name] == pytest.approx(1, abs=1e-5)
    assert means["visual_columns_cosine"] == pytest.approx(1, abs=1e-5)
