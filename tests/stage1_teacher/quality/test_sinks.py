"""Sinks are counted by the released threshold, and named where they lie in most pictures."""

import pytest
import torch

from vlm_distill_cache.common.attention.boxes import content_mask, tile_boxes
from vlm_distill_cache.common.attention.tiles import tiles_from_array
from vlm_distill_cache.common.cli import main as cachectl
from vlm_distill_cache.common.codecs.live import as_tensors
from vlm_distill_cache.common.codecs.registry import codec_from_dict
from vlm_distill_cache.common.opening import open_cache
from vlm_distill_cache.stage1_teacher.quality.fidelity import SinkCount


def test_a_planted_sink_is_found_by_row_and_column_with_its_mass():
    count, generator = SinkCount(columns=4), torch.Generator().manual_seed(0)
    for _ in range(6):
        received = 0.01 + 0.001 * torch.rand(12, generator=generator)
        received[6] = 1.0
        count.add(received, torch.ones(12, dtype=torch.bool))
    figures = count.figures("x")
    assert figures["x_sinks_per_picture"] == 1
    assert figures["x_sink_mass"] == pytest.approx(1 / (1 + 11 * 0.0105), abs=0.01)
    assert figures["x_sink_places"] == "row 2 column 3 in 100 %"


def test_the_threshold_is_mean_plus_one_standard_deviation_of_tokens_with_image():
    generator = torch.Generator().manual_seed(1)
    received = torch.rand(50, generator=generator).square()
    content = torch.rand(50, generator=generator) < 0.7
    count = SinkCount()
    count.add(received, content)
    inside = received[content].double()
    over = [float(value) for value in inside if value > inside.mean() + inside.std()]
    assert count.sinks == len(over)
    assert count.mass == pytest.approx(sum(over) / float(inside.sum()))


def test_pictures_of_other_layouts_are_counted_without_places_and_empty_ones_not_at_all():
    count = SinkCount(columns=2)
    for size in (4, 6):
        received = torch.ones(size)
        received[0] = 20.0
        count.add(received, torch.ones(size, dtype=torch.bool))
    count.add(torch.zeros(4), torch.ones(4, dtype=torch.bool))
    count.add(torch.ones(4), torch.zeros(4, dtype=torch.bool))
    assert count.pictures == 2
    assert "x_sink_places" not in count.figures("x")
    assert SinkCount().figures("x") == {}


def test_uniform_attention_has_no_sinks():
    count = SinkCount()
    for _ in range(3):
        count.add(torch.full((9,), 0.1), torch.ones(9, dtype=torch.bool))
    assert count.figures("x")["x_sink_places"] == "none in half of the pictures"
    assert count.figures("x")["x_sink_mass"] == 0


def test_a_cache_reports_its_sinks_in_manifest_card_and_inspect(build_cache, tmp_path):
    from click.testing import CliRunner

    path = tmp_path / "cache"
    signals = ("answer_attention", "visual_columns", "visual_map")
    build_cache(path, signals=signals, attention_dtype="f4", fidelity_samples=10)
    cache = open_cache(path)
    found = cache.manifest.fidelity
    columns = codec_from_dict(cache.plan.signals["visual_columns"])
    maps = codec_from_dict(cache.plan.signals["visual_map"])
    count, shares = SinkCount(columns=6), []
    for name in cache.sample_ids:
        record = cache.read(name)
        content = content_mask(tile_boxes(tiles_from_array(record["tiles"])))
        count.add(as_tensors(columns.decode(record)).mean(dim=0), content)
        full = as_tensors(maps.decode(record)).values[0].double()
        pairs = full[full > 0]
        threshold = full.mean() + full.std()  # the causal zeros included
        shares.append(float((pairs > threshold).double().mean()))
    expected = count.figures("visual_columns")
    assert found["visual_columns_sink_places"] == expected.pop("visual_columns_sink_places")
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-4)
    assert found["visual_map_sink_pairs"] == pytest.approx(sum(shares) / len(shares), rel=1e-3)
    assert 0 < found["visual_map_sink_mass"] < 1
    assert found["answer_attention_sinks_per_picture"] >= 0
    assert "visual_columns_sink_places" in (path / "README.md").read_text()
    assert "visual_map_sink_mass" in CliRunner().invoke(cachectl, ["inspect", str(path)]).output
