"""A student that sees and says what its teacher does has no loss, whatever shape the pictures have."""

from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from image_array import ImageArray
from loss_checks import make_objective
from tiny_cache import make_teacher
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from vlm_distill_cache.common.cache.schema import IGNORE_INDEX
from vlm_distill_cache.data.images.encoder import ImageEncoder
from vlm_distill_cache.data.sample import Sample, Turn
from vlm_distill_cache.data.text.collate import collate, text_rows, visual_keys
from vlm_distill_cache.stage1_teacher.config import BuildConfig
from vlm_distill_cache.stage1_teacher.loop.signals import (
    Sizes,
    build_codecs,
    encode_records,
    image_weights,
    reduce_output,
)
from vlm_distill_cache.stage2_student.batches.batch import TrainingSample
from vlm_distill_cache.stage2_student.batches.signals import collate_samples, decode_signals
from vlm_distill_cache.stage2_student.losses.attention_targets import pool_map
from vlm_distill_cache.stage2_student.losses.objective import requests_of, step_shares, units_of
from vlm_distill_cache.stage2_student.losses.terms import choose_terms

SIGNALS = ("logits", "answer_attention", "visual_columns", "visual_map", "text_attention")
TERMS = choose_terms([*SIGNALS, "all_attention"])
GROUPS, TOKENS = 2, 36
SQUARE = {"height": 72, "width": 72}
PROCESSORS = {
    "square": CLIPImageProcessorPil(size=SQUARE, crop_size=SQUARE, do_center_crop=False),
    "pad": LlavaImageProcessorPil(size={"shortest_edge": 72}, crop_size=SQUARE, do_pad=True),
    "crop": CLIPImageProcessorPil(size={"shortest_edge": 72}, crop_size=SQUARE),
}
SIZES = [(90, 30), (40, 100), (72, 72)]  # width, height
KINDS = [("kl", "sink_filtered"), ("cosine", "cosine"), ("relative", "sink_filtered"), ("kl_with_rest", "kl")]
TEXT_ROWS = 7
"""Of the one conversation that all samples have."""


def make_maps(samples, rows, *, seed, scale=2.0):
    """Attention as a capture gives it: answer and text rows [B, G, R, N], causal visual maps [B, G, N, N]."""
    generator = torch.Generator().manual_seed(seed)
    answer = 0.3 * torch.randn(samples, GROUPS, rows, TOKENS, generator=generator).mul(2).softmax(-1)
    text = 0.2 * torch.randn(samples, GROUPS, TEXT_ROWS, TOKENS, generator=generator).mul(2).softmax(-1)
    visual = torch.randn(samples, GROUPS, TOKENS, TOKENS, generator=generator).mul(scale)
    future = torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1)
    return {
        "answer": answer,
        "text": text,
        "visual": 0.4 * visual.masked_fill(future, -torch.inf).softmax(-1),
    }


def sum_rows(maps, weights):
    """Weighted sum [B, G, 1, N] of the rows of visual maps."""
    return (maps["visual"] * weights[:, None, :, None]).sum(dim=2, keepdim=True)


class Scene:
    """Pictures of some sizes, a teacher's signals of them in exact codecs, and students in the same terms."""

    def __init__(self, layout, sizes, *, grid=(6, 6), blind_rows=()):
        encoder = make_teacher().encoder
        encoder = replace(encoder, image_encoder=ImageEncoder.from_processor(PROCESSORS[layout], (6, 6)))
        assert encoder.image_encoder.layout == layout
        turns = (Turn(question="what color ?", answer="red"),)
        self.encoded = [
            encoder(
                Sample(
                    sample_id=f"{index}",
                    images=(ImageArray(np.full((height, width, 3), 90 + index, dtype=np.uint8), "p"),),
                    turns=turns,
                )
            )
            for index, (width, height) in enumerate(sizes)
        ]
        batch = collate(self.encoded, 0)
        labels = batch.labels[batch.labels != IGNORE_INDEX]
        self.rows = len(labels) // len(sizes)
        assert text_rows(batch).shape[1] == TEXT_ROWS
        generator = torch.Generator().manual_seed(0)
        self.logits = torch.randn(len(labels), len(encoder.tokenizer), generator=generator).mul(3)
        # Almost even attention: with padding's zeros in its statistics, the sink filter would keep nothing.
        self.maps = make_maps(len(sizes), self.rows, seed=1, scale=0.1)
        for sample, row in blind_rows:
            self.maps["answer"][sample, :, row] = 0
        output = {
            "logits": self.logits,
            "answer_attention": self.maps["answer"],
            "text_attention": self.maps["text"],
            "visual_map": self.maps["visual"],
            "visual_columns": sum_rows(self.maps, image_weights(batch, visual_keys(batch))[:, 0]),
        }
        config = BuildConfig(signals=SIGNALS, logits="exact", temperatures=(1.0,), attention_dtype="f4", groups=GROUPS)
        codecs = build_codecs(config, Sizes(grid=grid))
        records = encode_records(reduce_output(output, batch, codecs), batch, codecs)
        self.samples = [
            TrainingSample(encoded, decode_signals(record, codecs, TERMS, encoded.tiles, where="memory"))
            for encoded, record in zip(self.encoded, records, strict=True)
        ]

    def losses(self, parts, *, maps, logits, kinds):
        """All terms of one step split into micro-batches, by name, of a student with these outputs."""
        answer_kind, map_kind = kinds
        objective = make_objective(
            dict.fromkeys(TERMS, 1.0),
            groups=((0,),) * GROUPS,
            answer_kind=answer_kind,
            visual_map_kind=map_kind,
        )
        batches = [collate_samples([self.samples[i] for i in part], TERMS, pad_token_id=0) for part in parts]
        totals = [sum(counts) for counts in zip(*(units_of(batch) for batch in batches), strict=True)]
        found = dict.fromkeys(TERMS, 0.0)
        for part, batch, share in zip(parts, batches, step_shares(batches, totals), strict=True):
            own = torch.cat([logits[i * self.rows : (i + 1) * self.rows] for i in part])
            capture = FixedCapture({name: value[list(part)] for name, value in maps.items()})
            terms = objective(lambda own=own, **_: SimpleNamespace(logits=own), capture, batch, share).named()
            found = {name: value + float(terms[name]) for name, value in found.items()}
        return found


class FixedCapture:
    """Records the same attention whatever runs."""

    def __init__(self, maps):
        self.maps = maps

    @contextmanager
    def record(self, requests):
        columns = {name: sum_rows(self.maps, requests[name].row_weights) for name in requests.keys() & {"columns"}}
        yield self.maps | columns


@pytest.mark.parametrize("kinds", KINDS, ids="-".join)
@pytest.mark.parametrize("grid", [(6, 6), (4, 4)], ids=["teacher's grid", "coarser grid"])
@pytest.mark.parametrize("layout", PROCESSORS)
def test_a_student_equal_to_the_teacher_has_zero_loss(layout, grid, kinds):
    scene = Scene(layout, SIZES, grid=grid)
    for index in range(len(SIZES)):
        equal = scene.losses([(index,)], maps=scene.maps, logits=scene.logits, kinds=kinds)
        assert equal == pytest.approx(dict.fromkeys(TERMS, 0), abs=2e-5), SIZES[index]
        maps, logits = make_maps(len(SIZES), scene.rows, seed=2), scene.logits.roll(1, 0)
        other = scene.losses([(index,)], maps=maps, logits=logits, kinds=kinds)
        assert min(other.values()) > 1e-3, SIZES[index]


@pytest.mark.parametrize("kinds", KINDS, ids="-".join)
def test_a_split_step_has_the_same_losses_with_pictures_without_content_and_rows_that_do_not_look(kinds):
    """A picture of 1 x 500 pixels, padded to a square, gives no token half its area."""
    scene = Scene("pad", [(1, 500), *SIZES], blind_rows=[(1, 0), (3, 1)])
    student = {"maps": make_maps(4, scene.rows, seed=2), "logits": scene.logits.roll(1, 0), "kinds": kinds}
    whole = scene.losses([(0, 1, 2, 3)], **student)
    for parts in ([(0,), (1, 2, 3)], [(0, 1), (2, 3)], [(0, 2), (1,), (3,)]):
        assert scene.losses(parts, **student) == pytest.approx(whole, rel=1e-4, abs=1e-6)
    # Rows of text count whatever they look at; of attention, only rows and pictures that have any.
    assert units_of(collate_samples(scene.samples, TERMS, pad_token_id=0))[:7] == (
        4 * scene.rows,
        4 * scene.rows,
        3 * scene.rows - 2,
        3,
        3,
        3 * TEXT_ROWS,
        3,
    )


def test_the_mean_over_cells_is_one_weight_a_token():
    """Cells of unequal shares of tokens, some without content, some that no token touches; a sample without an image."""
    generator = torch.Generator().manual_seed(0)
    pool = torch.rand(2, 5, 4, generator=generator) * (torch.rand(2, 5, 4, generator=generator) < 0.7)
    content = torch.tensor([[True, True, False, True], [True, False, True, True]])
    pool[0, :, 3] = 0
    attention = torch.rand(3, GROUPS, 5, 5, generator=generator)
    keys = torch.arange(5).repeat(3, 1)
    for mask in (content, None):
        target = SimpleNamespace(student_pool=pool, content=mask, views=None)
        batch = SimpleNamespace(targets={"visual_columns": target}, keys=keys, has_image=torch.tensor([0, 2]))
        requests = requests_of(choose_terms(["visual_columns"]), batch, ((0,),) * GROUPS)  # type: ignore[arg-type]
        weights = requests["columns"].row_weights
        assert not weights[1].any()
        found = (attention * weights[:, None, :, None]).sum(dim=2)[[0, 2]] @ pool
        maps = pool_map(attention[[0, 2]], target)  # type: ignore[arg-type]
        cells = torch.ones_like(content) if mask is None else mask
        expected = torch.stack([of_sample[:, rows].mean(dim=1) for of_sample, rows in zip(maps, cells, strict=True)])
        torch.testing.assert_close(found, expected)


def test_sums_are_recorded_after_the_rows_that_they_are_taken_of():
    scene = Scene("square", SIZES)
    batch = collate_samples(scene.samples, TERMS, pad_token_id=0)
    for names in (list(TERMS), list(reversed(TERMS))):
        requests = requests_of({name: TERMS[name] for name in names}, batch, ((0,),) * GROUPS)
        kinds = [
            "sum"
            if getattr(request, "row_weights", None) is not None
            else "image"
            if request.rows is batch.keys
            else "text"
            for request in requests.values()
        ]
        assert kinds == sorted(kinds, key=["text", "image", "sum"].index)
        assert set(kinds) == {"text", "image", "sum"}
