"""A build with visual maps in every preset, pooled or not: what it writes, and what its card says it lost."""

from pathlib import Path

import pytest
import torch

from vlm_distill_cache.common.cache.manifest import read_manifest
from vlm_distill_cache.common.codecs.live import TeacherMap, as_tensors
from vlm_distill_cache.common.codecs.registry import codec_from_dict
from vlm_distill_cache.common.codecs.visual_map import VisualMapCodec
from vlm_distill_cache.common.errors import ConfigError
from vlm_distill_cache.common.opening import open_cache
from vlm_distill_cache.stage1_teacher.config import BuildConfig

VISUAL = ("logits", "visual_columns", "visual_map")


def teacher_maps(cache_dir: Path) -> dict[str, TeacherMap]:
    cache = open_cache(cache_dir)
    codec = codec_from_dict(cache.plan.signals["visual_map"])
    assert isinstance(codec, VisualMapCodec)
    return {sample_id: as_tensors(codec.decode(cache.read(sample_id))) for sample_id in cache.sample_ids}


@pytest.mark.parametrize("map_grid", [0, 3])
@pytest.mark.slow
def test_all_presets_of_a_build_have_the_masks_of_the_exact_map(tmp_path: Path, build_cache, map_grid: int):
    build_cache(tmp_path / "f4", signals=VISUAL, limit=4, attention_dtype="f4", map_grid=map_grid)
    exact = teacher_maps(tmp_path / "f4")
    cells = 9 if map_grid else 36
    for preset in ("exact", "blocks", "compact"):
        build_cache(tmp_path / preset, signals=VISUAL, limit=4, map_preset=preset, map_grid=map_grid)
        found = teacher_maps(tmp_path / preset)
        assert found.keys() == exact.keys()
        for sample_id, one in found.items():
            assert one.values.shape == (1, cells, cells)
            assert torch.equal(one.kept, exact[sample_id].kept)


@pytest.mark.parametrize(("preset", "floor"), [("exact", 0.999), ("compact", 0.98)])
def test_the_card_states_mean_and_worst_gradient_beside_the_control(
    tmp_path: Path, build_cache, preset: str, floor: float
):
    build_cache(tmp_path, signals=VISUAL, limit=4, map_preset=preset, fidelity_samples=3)
    card = read_manifest(tmp_path).fidelity
    names = ["visual_map_gradient_cosine", "visual_columns_gradient_cosine"]
    if preset == "exact":
        names.append("visual_map_plain_gradient_cosine")
    else:
        assert "visual_map_plain_gradient_cosine" not in card  # the preset does not serve that loss
    for name in names:
        assert floor < card[f"{name}_worst"] <= card[name] <= 1 + 1e-6
        assert card[f"control_{name}"] == pytest.approx(1, abs=1e-5)


def test_a_build_keeps_exact_masks_unless_told_otherwise():
    assert BuildConfig().map_preset == "exact"
    with pytest.raises(ConfigError, match=r"map_grid: expected a whole number of at least 0 and at most 64, got 65"):
        BuildConfig(map_grid=65)
