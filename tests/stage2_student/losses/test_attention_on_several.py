"""Attention losses of samples with several pictures: rows are one distribution over all, columns and maps a mean over pictures.

Every loss is compared with loops over samples and pictures that know nothing of padding, of requests or of views.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn.functional import cosine_similarity

from vlm_distill_cache.common.attention.boxes import area_pool, overlap_matrix, pool_keys, pool_queries, tile_boxes
from vlm_distill_cache.common.attention.tiles import View, grid_tile, of_view, several_to_arrays, views_of
from vlm_distill_cache.common.codecs.live import RowAttention, TeacherMap
from vlm_distill_cache.common.codecs.row_attention import AttentionRows, RowAttentionCodec, TextAttentionCodec
from vlm_distill_cache.common.codecs.visual_map import VisualColumnsCodec, VisualMapCodec
from vlm_distill_cache.stage2_student.batches.signals import Seen, decode_signals
from vlm_distill_cache.stage2_student.loss_weights import LossWeights
from vlm_distill_cache.stage2_student.losses.attention import (
    all_attention_loss,
    answer_attention_loss,
    visual_columns_loss,
    visual_map_loss,
)
from vlm_distill_cache.stage2_student.losses.objective import requests_of
from vlm_distill_cache.stage2_student.losses.terms import TERMS

GROUPS, ROWS, TEXT = 2, 3, 4
NAMES = ("answer_attention", "visual_columns", "visual_map", "all_attention")
CODECS = {
    "answer_attention": RowAttentionCodec(grid=(2, 2), groups=GROUPS, exact=True, several=True, frame_grid=(1, 2)),
    "text_attention": TextAttentionCodec(grid=(2, 2), groups=GROUPS, exact=True, several=True, frame_grid=(1, 2)),
    "visual_columns": VisualColumnsCodec(groups=GROUPS, exact=True),
    "visual_map": VisualMapCodec(groups=GROUPS, preset="f4"),
}


def shown(*sides, frames=0):
    """A picture a side, the last ones frames of a video."""
    count = len(sides)
    return tuple(grid_tile(side, side, View((float(k), k + 1.0), k >= count - frames)) for k, side in enumerate(sides))


# Teacher's and student's pictures of each sample of the batch: one, three, none, a picture and two frames.
SAMPLES = (
    (shown(4), shown(2)),
    (shown(4, 2, 4), shown(2, 4, 2)),
    ((), ()),
    (shown(2, 4, 4, frames=2), shown(4, 2, 2, frames=2)),
)


def tokens(tiles) -> int:
    return sum(tile.token_count for tile in tiles)


def masses(generator, *shape):
    return torch.rand(*shape, generator=generator).div(shape[-1] + 1.0)


class Teacher:
    """What a teacher said of one sample: attention of all its rows, and the record that is kept of it."""

    def __init__(self, tiles, seed):
        generator = torch.Generator().manual_seed(seed)
        self.tiles, self.maps = tiles, []
        for view in views_of(tiles):
            count = tokens(of_view(tiles, view))
            self.maps.append(masses(generator, GROUPS, count, count).tril())
        self.columns = torch.cat([one.mean(dim=1) for one in self.maps], dim=1) if tiles else torch.zeros(GROUPS, 0)
        self.rows = masses(generator, ROWS, GROUPS, tokens(tiles))
        self.text = masses(generator, TEXT if tiles else 0, GROUPS, tokens(tiles))
        times = [(0, float(k)) if tile.is_frame else (-1, float("nan")) for k, tile in enumerate(tiles)]
        times = times if any(tile.is_frame for tile in tiles) else []
        self.record = {
            "labels": np.arange(ROWS, dtype="<u4"),
            "image_hash": np.ones((len(tiles), 16), np.uint8),
            **several_to_arrays(tiles, times, len(tiles)),
        }
        for name, values in (("answer_attention", self.rows), ("text_attention", self.text)):
            cells = self.on_cells(values, CODECS[name])
            self.record |= CODECS[name].encode(AttentionRows(cells.numpy(), cells.sum(-1).numpy()), tiles=tiles)
        self.record |= CODECS["visual_columns"].encode(self.columns.numpy())
        maps = [one.numpy() for one in self.maps] or [np.zeros((GROUPS, 0, 0), np.float32)]
        self.record |= CODECS["visual_map"].encode(maps[0] if len(maps) == 1 else maps, tiles=tiles)

    def on_cells(self, values, codec):
        return pool_keys(values, overlap_matrix(tile_boxes(self.tiles), tile_boxes(codec.cells_of(self.tiles))))


def batch_of(samples):
    """A batch whose positions are visual tokens first, then text; its targets; and a student's attention, ``[B, G, T, T]``."""
    generator = torch.Generator().manual_seed(9)
    teachers = [Teacher(tiles, seed) for seed, (tiles, _) in enumerate(samples)]
    length = max(tokens(own) for _, own in samples) + TEXT
    attention = masses(generator, len(samples), GROUPS, length, length).tril().requires_grad_()
    terms = {name: TERMS[name] for name in NAMES}
    targets: dict = {name: ([], []) for name in terms}
    keys, rows, text = [], [], []
    for place, (teacher, (_, own)) in enumerate(zip(teachers, samples, strict=True)):
        count = tokens(own)
        keys.append(torch.arange(length - TEXT).where(torch.arange(length - TEXT) < count, -1))
        rows.append(count + 1 + torch.arange(ROWS))
        text.append(count + torch.arange(TEXT) if count else torch.full((TEXT,), -1))
        found = decode_signals(teacher.record, CODECS, terms, own, where="cache, sample 'a'")
        for name, target in found.items():
            targets[name][0].append(target)
            targets[name][1].append(place)
    batch = SimpleNamespace(
        keys=torch.stack(keys),
        rows=torch.stack(rows),
        text_rows=torch.stack(text),
        has_image=torch.tensor([place for place, (_, own) in enumerate(samples) if own]),
        targets={name: terms[name].collate(*both) for name, both in targets.items() if both[0]},
    )
    return teachers, batch, attention, terms


def recorded(requests, attention):
    """What the capture would record: rows by keys, 0 where either is padding; sums of rows where weights say so."""
    found = {}
    for name, request in requests.items():
        at = torch.arange(len(attention))[:, None, None]
        values = attention.transpose(1, 2).transpose(2, 3)[at, request.rows[:, :, None], request.keys[:, None]]
        real = (request.rows >= 0)[:, :, None] & (request.keys >= 0)[:, None]
        values = (values * real[..., None]).permute(0, 3, 1, 2)  # [B, G, R, M]
        if request.row_weights is not None:
            values = (request.row_weights[:, None, :, None] * values).sum(dim=2, keepdim=True)
        found[name] = values
    return found


def values_of(batch, attention, terms, losses, fed=None):
    requests = requests_of(terms, batch, ((0,), (1,)))
    if fed is not None:
        requests = {n: type(r)(r.rows, r.keys, r.groups, None) for n, r in requests.items()}
    none = torch.zeros(0)
    seen = Seen(batch, losses, recorded(requests, attention), {}, none, None, None, fed)
    found = {}
    for name, term in terms.items():
        target = batch.targets[name] if fed is None else batch.targets[name].of_fed(fed[batch.has_image])
        found[name] = term.value(seen, target, None if name != "visual_map" else True)[0]
    return found


def own_maps(attention, place, tiles):
    """A student's map of each picture of one sample."""
    found, at = [], 0
    for view in views_of(tiles):
        count = tokens(of_view(tiles, view))
        found.append(attention[place, :, at : at + count, at : at + count])
        at += count
    return found


def pooled_pair(theirs, ours, teacher_tiles, student_tiles):
    """Two maps of one picture on the tokens of the side with fewer."""
    boxes = tile_boxes(teacher_tiles), tile_boxes(student_tiles)
    if tokens(student_tiles) <= tokens(teacher_tiles):
        pool = area_pool(*boxes)
        return pool_queries(pool_keys(theirs, pool), pool), ours
    pool = area_pool(boxes[1], boxes[0])
    return theirs, pool_queries(pool_keys(ours, pool), pool)


def slowly(teachers, samples, attention, losses):
    """The losses by loops."""
    rows, columns, maps, every = [], [], [], []
    for place, (teacher, (tiles, own)) in enumerate(zip(teachers, samples, strict=True)):
        if not own:
            continue
        of_columns, of_maps = [], []
        for view, theirs, ours in zip(views_of(tiles), teacher.maps, own_maps(attention, place, own), strict=True):
            both = pooled_pair(theirs, ours, of_view(tiles, view), of_view(own, view))
            of_columns.append((1 - cosine_similarity(both[0].mean(dim=1), both[1].mean(dim=1), dim=-1)).mean())
            kept = TeacherMap.from_maps(both[0][None])
            of_maps.append(visual_map_loss(both[1][None], kept, kind=losses.visual_map_kind))
        columns.append(torch.stack(of_columns).mean())
        maps.append(torch.stack(of_maps).mean())
        count = tokens(own)
        cells, theirs, ours = [], [], []
        for name, first, values in (
            ("answer_attention", count + 1, teacher.rows), ("text_attention", count, teacher.text)
        ):  # fmt: skip
            grids = CODECS[name].cells_of(tiles)
            cells = grids
            mine = attention[place, :, first : first + len(values), :count].transpose(0, 1)
            theirs.append(teacher.on_cells(values, CODECS[name]))
            ours.append(pool_keys(mine, overlap_matrix(tile_boxes(own), tile_boxes(grids))))
        for row in range(ROWS):
            a, b = theirs[0][row], ours[0][row]
            share, other = a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True)
            rows.append((a.sum(-1) * (share * (share / other).log()).sum(-1)).mean())
        blocks = []
        for maps_of, side in ((teacher.maps, tiles), (own_maps(attention, place, own), own)):
            pool = overlap_matrix(tile_boxes(side), tile_boxes(cells))
            whole = torch.stack([torch.block_diag(*(one[group] for one in maps_of)) for group in range(GROUPS)])
            blocks.append(pool_queries(pool_keys(whole, pool), pool))
        weights = overlap_matrix(tile_boxes(own), tile_boxes(cells)).sum(dim=0)[None]
        every.append(
            all_attention_loss(
                blocks[1][None], ours[1], blocks[0][None], theirs[1],
                text_sample=torch.zeros(TEXT, dtype=torch.int64), row_weights=weights,
            )
        )  # fmt: skip
    means = [torch.stack(found).mean() for found in (rows, columns, maps, every)]
    return dict(zip(NAMES, means, strict=True))


@pytest.mark.parametrize("kind", ["cosine", "kl", "mse", "sink_filtered"])
def test_losses_of_several_pictures_are_those_of_loops_over_them(kind):
    losses = LossWeights(visual_map_kind=kind, attention_reduction="mean")
    teachers, batch, attention, terms = batch_of(SAMPLES)
    found, wanted = (values_of(batch, attention, terms, losses), slowly(teachers, SAMPLES, attention, losses))
    for name in NAMES:
        torch.testing.assert_close(found[name], wanted[name], rtol=2e-5, atol=1e-7)
        gradients = [torch.autograd.grad(of[name], attention, retain_graph=True)[0] for of in (found, wanted)]
        torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-6)
    assert {name: TERMS[name].count(batch.targets[name]) for name in NAMES} == {
        "answer_attention": 3 * ROWS, "visual_columns": 3, "visual_map": 3, "all_attention": 3
    }  # fmt: skip
    maps = [name for name in requests_of(terms, batch, ((0,), (1,))) if name.startswith("visual.")]
    assert maps == ["visual.0", "visual.1", "visual.2"]  # nothing of the square of all visual tokens


def test_a_sample_with_one_picture_has_the_same_loss_beside_one_with_several():
    losses = LossWeights(attention_reduction="mean")
    alone = values_of(*batch_of(SAMPLES[:1])[1:], losses)
    assert batch_of(SAMPLES[:1])[1].targets["visual_map"].views is None  # as it always was
    _, batch, attention, terms = batch_of((SAMPLES[0], SAMPLES[0][:1] + SAMPLES[0][1:]))
    both = values_of(batch, attention, terms, losses)
    assert all(torch.isfinite(value) for value in (*alone.values(), *both.values()))
    one, several = (batch_of(samples) for samples in (SAMPLES[:1], SAMPLES[:2]))
    for name in ("visual_columns", "visual_map"):
        target = several[1].targets[name]
        torch.testing.assert_close(target.teacher[0], one[1].targets[name].teacher[0][..., : target.teacher.shape[-1]])


def test_fewer_fed_tokens_of_several_pictures_keep_each_picture_apart():
    """All tokens fed, each for itself, is what it is without a choice; of a picture none of whose tokens is fed nothing counts."""
    losses = LossWeights(visual_map_kind="cosine", attention_reduction="mean")
    _, batch, attention, terms = batch_of(SAMPLES)
    whole = values_of(batch, attention, terms, losses)
    fed = torch.diag_embed((batch.keys >= 0).float())
    same = values_of(batch, attention, terms, losses, fed)
    for name in NAMES:
        torch.testing.assert_close(same[name], whole[name], rtol=1e-5, atol=1e-7)
    fed[1, :4] = 0  # its first picture
    content = batch.targets["visual_columns"].of_fed(fed[batch.has_image]).content
    assert content.sum(dim=1).tolist() == [4, 0, 4, 4, 4, 4, 4]


def test_a_loss_is_a_mean_over_a_samples_pictures_then_over_samples():
    generator = torch.Generator().manual_seed(0)
    student, teacher = masses(generator, 6, GROUPS, 5), masses(generator, 6, GROUPS, 5)
    owner = torch.tensor([0, 1, 1, 1, 2, 2])
    each = [visual_columns_loss(student[k : k + 1], teacher[k : k + 1]) for k in range(6)]
    wanted = (each[0] + (each[1] + each[2] + each[3]) / 3 + (each[4] + each[5]) / 2) / 3
    torch.testing.assert_close(visual_columns_loss(student, teacher, sample_index=owner), wanted)
    teacher[3:5] = 0  # nobody looked there
    wanted = (each[0] + (each[1] + each[2]) / 2 + each[5]) / 3
    torch.testing.assert_close(visual_columns_loss(student, teacher, sample_index=owner), wanted)


def test_rows_weigh_pictures_by_the_teachers_mass_and_learn_which_one_is_looked_at():
    """The contract: a row's KL is the mean of the pictures' KLs, by mass, and that of the shares of the pictures."""
    generator = torch.Generator().manual_seed(0)
    both = [masses(generator, ROWS, 1, 12) for _ in range(2)]
    pictures = [side.view(ROWS, 3, 4) for side in both]
    share = [side.sum(-1) / side.sum((-1, -2))[:, None] for side in pictures]  # of each picture
    inner = [side / side.sum(-1, keepdim=True) for side in pictures]
    kl = (share[0] * (share[0] / share[1]).log()).sum(-1) + (
        share[0] * (inner[0] * (inner[0] / inner[1]).log()).sum(-1)
    ).sum(-1)
    found = answer_attention_loss(both[1], RowAttention.from_cells(both[0]))
    torch.testing.assert_close(found, (kl * both[0].sum((-1, -2))).mean())


def test_pictures_that_a_student_does_not_see_do_not_count_in_its_rows():
    teacher = Teacher(shown(4, 2, 4), 3)
    target = decode_signals(
        teacher.record, CODECS, {"answer_attention": TERMS["answer_attention"]}, shown(2, 2), where="x"
    )["answer_attention"]
    cells = teacher.on_cells(teacher.rows, CODECS["answer_attention"])[..., :8]
    torch.testing.assert_close(target.teacher, cells)
    torch.testing.assert_close(target.image_mass, cells.sum(-1))
