"""Every codec has the whole interface, imports no torch, and finds nothing wrong with what it writes."""

import inspect
import subprocess
import sys

import numpy as np
import pytest
import torch

from vlm_distill_cache.common.attention.tiles import tiles_from_array
from vlm_distill_cache.common.cache.plan import Plan
from vlm_distill_cache.common.cache.schema import check_record
from vlm_distill_cache.common.codecs.answers import AnswersCodec
from vlm_distill_cache.common.codecs.checks import codec_damage, value_damage
from vlm_distill_cache.common.codecs.description import Codec
from vlm_distill_cache.common.codecs.hidden_states import HiddenCodec, ProjectorOutputCodec
from vlm_distill_cache.common.codecs.live import RowAttention, as_tensors, map_tensors, select_entries
from vlm_distill_cache.common.codecs.logits import LogitCodec, VisualLogitsCodec
from vlm_distill_cache.common.codecs.registry import CODECS, codec_from_dict
from vlm_distill_cache.common.codecs.row_attention import RowAttentionCodec
from vlm_distill_cache.common.codecs.tower_attention import TowerAttentionCodec
from vlm_distill_cache.common.codecs.visual_map import VisualColumnsCodec, VisualMapCodec
from vlm_distill_cache.stage1_teacher.config import SIGNALS
from vlm_distill_cache.stage1_teacher.loop.signals import EXTRACTORS, Extractor

TILES = np.array([[3, 4, 0, 0, 1, 1]], np.float32)
LABELS = torch.tensor([4, 9, 7])


def sound(kind: type[Codec], *, exact: bool = False) -> tuple[Codec, dict[str, np.ndarray]]:
    """A codec of a class, and what it writes of three rows that look at twelve visual tokens."""
    generator = torch.Generator().manual_seed(3)
    if issubclass(kind, LogitCodec):
        codec = kind.from_preset("exact" if exact else "default")
        logits = 3 * torch.randn(12 if kind is VisualLogitsCodec else 3, 300, generator=generator)
        labels = logits.argmax(dim=1) if kind is VisualLogitsCodec else LABELS
        return codec, codec.encode(select_entries(codec, logits, labels))
    if issubclass(kind, RowAttentionCodec):
        codec = kind(grid=(3, 4), groups=2, exact=exact)
        return codec, codec.encode(RowAttention.from_cells(torch.rand(3, 2, 12, generator=generator) / 12))
    if issubclass(kind, HiddenCodec):
        codec = kind(width=5, exact=exact, **{} if kind is ProjectorOutputCodec else {"layers": (0, 2)})
        rows = 3 if codec.axis == "row" else 12
        return codec, codec.encode(torch.randn(rows, len(codec.layers), 5, generator=generator))
    if kind is VisualColumnsCodec:
        return (codec := kind(groups=2, exact=exact)), codec.encode(torch.rand(2, 12, generator=generator) / 12)
    if kind is TowerAttentionCodec:
        return (codec := kind(exact=exact)), codec.encode(torch.rand(12, generator=generator) / 12)
    if kind is VisualMapCodec:
        codec = kind(groups=2, preset="f4" if exact else "exact")
        maps = torch.rand(2, 12, 12, generator=generator).square().tril() / 12
        return codec, codec.encode(maps, tiles=tiles_from_array(TILES))
    assert kind is AnswersCodec
    return (codec := kind(max_new_tokens=5)), codec.encode(("a red circle",))


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("exact", [False, True])
def test_every_codec_has_the_whole_interface_and_finds_no_damage_in_what_it_writes(name: str, exact: bool):
    kind = CODECS[name]
    assert issubclass(kind, Codec)
    assert kind.signal == name
    assert not inspect.isabstract(kind)
    codec, encoded = sound(kind, exact=exact)
    check_record(encoded, codec.fields())
    record = encoded | {
        "image_hash": np.ones((1, 16), np.uint8),
        "labels": LABELS.numpy().astype("<u4"),
        "tiles": TILES,
    }
    stored = codec.to_dict()
    assert codec_from_dict(stored) == codec
    assert list(kind.settings_damage(stored)) == []
    assert codec_damage({name: stored}) == ([], [])
    assert list(codec.damage(record)) == []
    fields = {"it": codec.fields()}
    plan = Plan(store="zarr", sample_count=1, shard_size=1, fingerprints={}, signals={"it": stored}, fields=fields)
    assert list(value_damage(record, plan)) == []
    assert type(codec.decode(record)) is not type(None)


@pytest.mark.parametrize("name", CODECS)
def test_arrays_of_another_dtype_or_shape_than_the_codecs_are_damage(name: str):
    codec, encoded = sound(CODECS[name])
    record = encoded | {
        "image_hash": np.ones((1, 16), np.uint8),
        "labels": LABELS.numpy().astype("<u4"),
        "tiles": TILES,
    }
    fields = {"it": codec.fields()}
    signals = {"it": codec.to_dict()}
    plan = Plan(store="zarr", sample_count=1, shard_size=1, fingerprints={}, signals=signals, fields=fields)
    for field in codec.fields():
        for wrong in (record[field.name].astype(np.float64), record[field.name][..., None]):
            assert any(line.startswith(f"{field.name} has rows of") for line in value_damage(
                record | {field.name: wrong}, plan
            ))  # fmt: skip
        lacking = {name: array for name, array in record.items() if name != field.name}
        assert any(line.startswith(f"{field.name} is missing") for line in value_damage(lacking, plan))


@pytest.mark.parametrize("name", [name for name, kind in CODECS.items() if kind is not AnswersCodec])
def test_what_is_decoded_becomes_tensors_of_the_same_numbers(name: str):
    codec, encoded = sound(CODECS[name])
    decoded = codec.decode(encoded | {"tiles": TILES})
    parts = [decoded] if isinstance(decoded, np.ndarray) else [v for v in vars(decoded).values() if hasattr(v, "dtype")]
    found: list[torch.Tensor] = []
    map_tensors(as_tensors(decoded), lambda tensor: found.append(tensor) or tensor)
    assert len(found) == len(parts)
    for tensor, array in zip(found, parts, strict=True):
        np.testing.assert_array_equal(tensor.numpy(), array)


def test_there_is_an_extractor_for_each_signal_that_a_build_can_be_asked_for():
    assert set(EXTRACTORS) == set(SIGNALS) == set(CODECS) - {AnswersCodec.signal}
    assert all(isinstance(extractor, Extractor) for extractor in EXTRACTORS.values())


def test_codecs_import_no_torch():
    code = "import vlm_distill_cache.common.codecs.checks, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
