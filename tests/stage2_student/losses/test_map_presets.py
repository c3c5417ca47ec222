"""Cached visual maps in training: exact for students of the map's cells, refused where they would mislead."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from vlm_distill_cache.common.attention.tiles import Tile, pooled_tiles, tiles_to_array
from vlm_distill_cache.common.codecs.live import TeacherMap
from vlm_distill_cache.common.codecs.live import pool_map as pool_to_cells
from vlm_distill_cache.common.codecs.visual_map import VisualMapCodec
from vlm_distill_cache.common.errors import CacheMismatchError
from vlm_distill_cache.stage2_student.batches.signals import decode_signals
from vlm_distill_cache.stage2_student.loss_weights import LossWeights
from vlm_distill_cache.stage2_student.losses.attention import sink_filtered_cosine_loss, visual_map_loss
from vlm_distill_cache.stage2_student.losses.attention_targets import AttentionTarget, pool_map
from vlm_distill_cache.stage2_student.losses.terms import TERMS

SQUARE = (Tile(12, 12, (0.0, 0.0, 1.0, 1.0)),)
PADDED = (Tile(12, 12, (0.0, -0.25, 1.0, 1.25)),)
TILED = tuple(Tile(6, 6, (0.5 * x, 0.0, 0.5 * x + 0.5, 1.0)) for x in (0, 1))
LAYOUTS = pytest.mark.parametrize("tiles", [SQUARE, PADDED, TILED], ids=["square", "padded", "two tiles"])
GROUPS = 2


def causal_maps(cells: int, *, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    scores = 1.5 * torch.randn(GROUPS, cells, cells, generator=generator)
    scores += 3.0 * (torch.rand(GROUPS, 1, cells, generator=generator) < 0.06)
    future = torch.ones(cells, cells, dtype=torch.bool).triu(1)
    return 0.6 * scores.masked_fill(future, -math.inf).softmax(-1)


def target_of(codec: VisualMapCodec, maps: Tensor, tiles, student_tiles) -> AttentionTarget:
    """What stage two makes of a record of these maps for a student."""
    record = codec.encode(pool_to_cells(codec, maps, tiles), tiles=tiles) | {"tiles": tiles_to_array(tiles)}
    terms = {"visual_map": TERMS["visual_map"]}
    return decode_signals(record, {"visual_map": codec}, terms, student_tiles, where="cache, sample 'a'")["visual_map"]


def loss_and_gradient(target: AttentionTarget, student: Tensor, loss=sink_filtered_cosine_loss):
    """Value, and gradient on the student's own tokens, as the objective computes them."""
    leaf = student.clone().requires_grad_()
    pooled = pool_map(leaf[None], SimpleNamespace(student_pool=target.student_pool[None], views=None))  # type: ignore[arg-type]
    assert target.kept is not None
    teacher = TeacherMap(target.teacher[None], target.kept[None], target.complete)
    value = loss(pooled, teacher, token_mask=target.content[None])
    value.backward()
    return value.detach(), leaf.grad


def tokens_of(tiles) -> int:
    return sum(tile.token_count for tile in tiles)


@LAYOUTS
@pytest.mark.parametrize("loss", [sink_filtered_cosine_loss, visual_map_loss])
def test_a_map_pooled_before_caching_trains_as_the_full_map_pooled_in_training(tiles, loss):
    maps = causal_maps(tokens_of(tiles), seed=0)
    student_tiles = pooled_tiles(tiles, 3)
    student = causal_maps(tokens_of(student_tiles), seed=1)
    full = target_of(VisualMapCodec(groups=GROUPS, preset="f4"), maps, tiles, student_tiles)
    value, gradient = loss_and_gradient(full, student, loss)
    for preset, tolerance in (("f4", 1e-5), ("exact", 5e-3)):
        codec = VisualMapCodec(groups=GROUPS, preset=preset, grid=3)  # type: ignore[arg-type]
        pooled = target_of(codec, maps, tiles, student_tiles)
        assert torch.equal(pooled.kept, full.kept)
        found, bent = loss_and_gradient(pooled, student, loss)
        torch.testing.assert_close(found, value, rtol=tolerance, atol=1e-5)
        assert float((bent - gradient).norm() / gradient.norm()) < 10 * tolerance


@LAYOUTS
@pytest.mark.parametrize("preset", ["exact", "blocks", "compact"])
def test_students_of_the_maps_tokens_train_with_the_teachers_mask(tiles, preset: str):
    maps, student = (causal_maps(tokens_of(tiles), seed=seed) for seed in (0, 1))
    full = target_of(VisualMapCodec(groups=GROUPS, preset="f4"), maps, tiles, tiles)
    target = target_of(VisualMapCodec(groups=GROUPS, preset=preset), maps, tiles, tiles)  # type: ignore[arg-type]
    assert torch.equal(target.kept, full.kept)
    value, gradient = loss_and_gradient(full, student)
    found, bent = loss_and_gradient(target, student)
    torch.testing.assert_close(found, value, rtol=0.01, atol=1e-4)
    assert torch.equal(bent != 0, gradient != 0)
    cosine = torch.nn.functional.cosine_similarity(bent.flatten(), gradient.flatten(), dim=0)
    assert float(cosine) > {"exact": 0.9999, "blocks": 0.999, "compact": 0.995}[preset]


@pytest.mark.parametrize("preset", ["exact", "blocks", "compact"])
def test_a_student_without_sinks_sees_the_exact_teacher_vector(preset: str):
    """Its filter takes nothing out, so that only float16 column means matter."""
    maps = causal_maps(144, seed=0)
    student = torch.full((GROUPS, 144, 144), 1 / 144)
    full = target_of(VisualMapCodec(groups=GROUPS, preset="f4"), maps, SQUARE, SQUARE)
    target = target_of(VisualMapCodec(groups=GROUPS, preset=preset), maps, SQUARE, SQUARE)  # type: ignore[arg-type]
    value, gradient = loss_and_gradient(full, student)
    found, bent = loss_and_gradient(target, student)
    torch.testing.assert_close(found, value, rtol=1e-3, atol=1e-6)
    assert float((bent - gradient).norm() / gradient.norm()) < 2e-3


@pytest.mark.parametrize("preset", ["exact", "blocks", "compact"])
def test_finer_students_are_pooled_to_the_map_and_keep_its_mask(preset: str):
    maps, finer = causal_maps(144, seed=0), (Tile(24, 24, (0.0, 0.0, 1.0, 1.0)),)
    target = target_of(VisualMapCodec(groups=GROUPS, preset=preset), maps, SQUARE, finer)  # type: ignore[arg-type]
    assert torch.equal(target.kept, TeacherMap.from_maps(maps).kept)
    assert target.student_pool.shape == (576, 144)


def test_coarser_students_get_a_mask_of_the_pooled_values():
    maps, coarser = causal_maps(144, seed=0), (Tile(6, 6, (0.0, 0.0, 1.0, 1.0)),)
    full = target_of(VisualMapCodec(groups=GROUPS, preset="f4"), maps, SQUARE, coarser)
    target = target_of(VisualMapCodec(groups=GROUPS, preset="exact"), maps, SQUARE, coarser)
    assert target.teacher.shape == (GROUPS, 36, 36)
    assert float((target.kept == full.kept).float().mean()) > 0.995
    torch.testing.assert_close(target.teacher, full.teacher, rtol=0.05, atol=1e-4)


@pytest.mark.parametrize("preset", ["blocks", "compact"])
def test_coarser_students_are_refused_where_sinks_have_no_values(preset: str):
    maps, coarser = causal_maps(144, seed=0), (Tile(6, 6, (0.0, 0.0, 1.0, 1.0)),)
    with pytest.raises(CacheMismatchError, match=r"sample 'a'.*coarser than the map's.*map_grid"):
        target_of(VisualMapCodec(groups=GROUPS, preset=preset), maps, SQUARE, coarser)  # type: ignore[arg-type]


def test_a_loss_that_the_preset_cannot_serve_is_refused_before_training():
    plans = {
        preset: {"visual_map": VisualMapCodec(groups=1, preset=preset).to_dict()}  # type: ignore[arg-type]
        for preset in ("exact", "blocks", "f4")
    }
    check = TERMS["visual_map"].check_cache
    filtered, cosine = LossWeights(visual_map=1.0), LossWeights(visual_map=1.0, visual_map_kind="cosine")
    for preset, signals in plans.items():
        check(signals, filtered, "phase dft, cache", None)
        if preset != "blocks":
            check(signals, cosine, "phase dft, cache", None)
    with pytest.raises(CacheMismatchError, match=r"phase dft, cache.*visual_map_kind=sink_filtered"):
        check(plans["blocks"], cosine, "phase dft, cache", None)
