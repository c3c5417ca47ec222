"""What no teacher says is refused by whoever decodes it, looked through before or not; what teachers say never is."""

import numpy as np
import pytest
import torch
from cache_factory import make_plan
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_distill_cache.common.attention.tiles import tiles_from_array
from vlm_distill_cache.common.cache.plan import Plan
from vlm_distill_cache.common.codecs.live import RowAttention, select_entries
from vlm_distill_cache.common.codecs.logits import LogitCodec
from vlm_distill_cache.common.codecs.row_attention import RowAttentionCodec
from vlm_distill_cache.common.codecs.visual_map import VisualColumnsCodec, VisualMapCodec
from vlm_distill_cache.common.errors import CacheFormatError

TEMPERATURES = (0.3, 1.0, 2.0, 50.0)
POSSIBLE = [(0, -np.inf), (0, -15), (3, 0.0)]  # of 2^32 ids: next to nothing when it is cold, and all when it is hot
TILES = np.array([[3, 4, 0, 0, 1, 1]], np.float32)


def rows(seed: int, *, preset: str = "default", scale: float = 3.0):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(6, 400, generator=generator)
    labels = torch.randint(400, (6,), generator=generator)
    codec = LogitCodec.from_preset(preset, temperatures=TEMPERATURES)
    return codec, codec.encode(select_entries(codec, logits, labels)) | {"labels": labels.numpy().astype("u4")}


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    preset=st.sampled_from(["lean", "default", "full", "exact", "fixed:2", "fixed:9"]),
    scale=st.sampled_from([0.0, 0.01, 1.0, 5.0, 30.0, 300.0]),
)
def test_whatever_logits_a_teacher_has_are_possible_at_every_temperature(seed, preset, scale):
    codec, record = rows(seed, preset=preset, scale=scale)
    assert list(codec.damage(record)) == []
    codec.decode(record)


@pytest.mark.parametrize("preset", ["default", "exact"])
@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("token_ids", lambda a: a * 0),
        ("log_gap", lambda a: a[::-1]),
        ("log_gap", lambda a: a * 0),
        ("top_logprob", lambda a: a * 0 + 0.001),
        ("top_logprob", lambda a: a * 0 - 15),
        *(("tail_logmass", lambda a, c=column, v=value: np.where(np.arange(4) == c, v, a).astype(a.dtype))
          for column in range(4) for value in (-np.inf, -15, 0.0, np.nan) if (column, value) not in POSSIBLE),
    ],
)  # fmt: skip
def test_rows_that_are_no_distribution_are_not_decoded(preset, name, change):
    codec, record = rows(3, preset=preset, scale=1.0)
    with pytest.raises(CacheFormatError, match="no teacher says so"):
        codec.decode(record | {name: change(record[name])})


def test_gaps_below_zero_are_log_probabilities_above_zero():
    codec, record = rows(4, preset="exact")
    for wrong in (-record["log_gap"], record["log_gap"] + 1, record["log_gap"] * np.nan):
        with pytest.raises(CacheFormatError, match="log_gap"):
            codec.decode(record | {"log_gap": wrong})


@pytest.mark.parametrize("preset", ["exact", "exact8", "f4", "blocks", "compact"])
def test_maps_of_more_mass_than_their_rows_are_not_decoded(preset):
    maps = torch.rand(2, 12, 12, generator=torch.Generator().manual_seed(1)).tril()
    maps /= maps.sum(dim=2, keepdim=True)
    codec = VisualMapCodec(groups=2, preset=preset)
    record = codec.encode(maps, tiles=tiles_from_array(TILES)) | {"tiles": TILES}
    codec.decode(record)
    name, values = next((name, array) for name, array in record.items() if name in ("visual_map", "map_scale"))
    if preset == "exact":
        changed = {
            "map_scale": np.full_like(record["map_scale"], 2),
            "map_largest": np.ones_like(record["map_largest"]),
        }
    else:
        changed = {name: np.full_like(values, 255 if values.dtype == np.uint8 else 1)}
    with pytest.raises(CacheFormatError, match="of the mass"):
        codec.decode(record | changed)


def test_columns_and_rows_that_contradict_their_mass_are_not_decoded():
    columns = VisualColumnsCodec(groups=2)
    with pytest.raises(CacheFormatError, match="of the mass"):
        columns.decode({"visual_columns": np.ones((36, 2), np.float16)})
    for exact in (False, True):
        codec = RowAttentionCodec(grid=(2, 2), groups=1, exact=exact)
        record = codec.encode(RowAttention(torch.full((3, 1, 4), 0.1), torch.full((3, 1), 0.4)))
        codec.decode(record)
        with pytest.raises(CacheFormatError, match="answer_image_mass"):
            codec.decode(record | {"answer_attention": record["answer_attention"] * 0})


@pytest.mark.parametrize("region", [
    [10, 10, 11, 11], [-131_072, -131_072, 131_072, 131_072], [0, 0, 1e-40, 1e-40], [0, -1, 1, 0], [0.5, 0.5, 0.50000006, 1],
])  # fmt: skip
def test_tiles_beside_the_picture_or_of_next_to_nothing_are_of_none(region):
    with pytest.raises(CacheFormatError, match="tokens on the picture"):
        tiles_from_array(np.array([[6, 6, *region]], np.float32))


@pytest.mark.parametrize("oblong", [1, 7, 200, 100_000])
def test_the_most_oblong_pictures_have_tiles_padded_or_cut(oblong):
    half = (oblong - 1) / 2
    for region in ([0, -half, 1, oblong - half], [0, 0, 1, oblong], [0, 0.5 - 0.5 / oblong, 1, 0.5 + 0.5 / oblong]):
        assert tiles_from_array(np.array([[24, 24, *region]], np.float32))


HIDDEN = {"codec": "hidden", "layers": [4], "width": 96, "exact": False}
TEACHER = {"layers": 4, "hidden_size": 96, "groups": [[0], [1]], "layer_choice": [0, 1]}


def test_what_a_plan_says_of_its_signals_is_what_its_teacher_has():
    def plan(*, hidden=None, teacher=None, columns=2, temperature=2.0) -> Plan:
        base = make_plan()
        logits = LogitCodec(floor=0.001, min_k=1, max_k=64).to_dict() | {"temperatures": [1.0, temperature]}
        signals = {"logits": logits, "visual_map": base.signals["visual_map"] | {"groups": columns},
                   "hidden": HIDDEN | (hidden or {})}  # fmt: skip
        return make_plan(signals=signals, fields={**base.fields, "hidden": ()}, teacher=TEACHER | (teacher or {}))

    plan()
    for wrong, where in [
        ({"hidden": {"layers": [99]}}, r"signals.hidden.layers\[0\] is 99; expected a whole number from 0 to 4"),
        ({"hidden": {"width": 95}}, "signals.hidden.width is 95; expected 96"),
        ({"teacher": {"hidden_size": 1}}, "signals.hidden.width is 96; expected 1"),
        ({"teacher": {"groups": []}}, "teacher.groups is .*expected a list of 2"),
        ({"teacher": {"layer_choice": [3, 4]}}, "layer_choice"),
        ({"temperature": 1e308}, r"temperatures\[1\] is 1e\+308; expected a number from 0.01 to 1000"),
        ({"temperature": 1e-300}, r"temperatures\[1\]"),
    ]:
        with pytest.raises(CacheFormatError, match=where):
            plan(**wrong)
