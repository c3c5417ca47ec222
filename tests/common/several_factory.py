"""Small caches of format version 2: text alone, one picture, two in two turns, frames of a clip, frames beside a picture.

Made from numbers, without a model. Run as a script it writes the frozen caches of ``tests/common/fixtures`` again, which is
for a new format version only: ``python tests/common/several_factory.py FOLDER``.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL.Image
from cache_factory import FIELDS, SIGNALS, make_plan, make_record

from vlm_distill_cache.common.attention.tiles import Tile, of_view, several_to_arrays, views_of
from vlm_distill_cache.common.cache.manifest import Manifest, seal
from vlm_distill_cache.common.cache.plan import Plan, write_plan
from vlm_distill_cache.common.cache.schema import Record
from vlm_distill_cache.common.cache.shared_images import ImageSharer, SharedImages, with_visual_source
from vlm_distill_cache.common.cache.stores import finish_shard, open_writer
from vlm_distill_cache.common.codecs.row_attention import AttentionRows, RowAttentionCodec, TextAttentionCodec
from vlm_distill_cache.common.codecs.visual_map import VisualColumnsCodec, VisualMapCodec
from vlm_distill_cache.common.pixels import image_hash

ANSWER = RowAttentionCodec(grid=(2, 3), groups=2, several=True, frame_grid=(1, 2))
TEXT = TextAttentionCodec(grid=(1, 2), groups=1, several=True)
COLUMNS, MAPS = VisualColumnsCodec(groups=2), VisualMapCodec(groups=2, preset="exact")
CODECS = (ANSWER, TEXT, COLUMNS, MAPS)
WHOLE = (0.0, 0.0, 1.0, 1.0)
NAN = float("nan")


def still(rows: int, cols: int, number: int) -> Tile:
    return Tile(rows=rows, cols=cols, region=WHOLE, span=(number, number + 1))


def frames(rows: int, cols: int, first: int, count: int) -> Tile:
    return Tile(rows=rows, cols=cols, region=WHOLE, span=(first, first + count), is_frame=True)


# Tiles, the medium and seconds of each picture, and the seed of each picture.
SHOWN: dict[str, tuple[tuple[Tile, ...], tuple[tuple[int, float], ...], tuple[int, ...]]] = {
    "text": ((), (), ()),
    "one": ((still(2, 2, 0),), (), (1,)),
    "two": ((still(2, 2, 0), still(1, 3, 1)), (), (1, 2)),
    "clip": ((frames(2, 2, 0, 2), frames(2, 2, 2, 2)), ((0, 0.0), (0, 0.5), (0, 1.0), (0, 1.5)), (3, 4, 5, 6)),
    "two again": ((still(2, 2, 0), still(1, 3, 1)), (), (1, 2)),
    "both": ((still(2, 2, 0), frames(1, 2, 1, 1), frames(1, 2, 2, 1)), ((-1, NAN), (1, 0.0), (1, 2.0)), (2, 3, 4)),
}
FAILED = ("broken", "image is truncated")


def picture(seed: int) -> PIL.Image.Image:
    """A picture of 12 x 8 pixels."""
    return PIL.Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 12, 3)).astype(np.uint8))


def several_plan(store: str = "zarr", **changes: object) -> Plan:
    signals = {"logits": SIGNALS["logits"]} | {codec.signal: codec.to_dict() for codec in CODECS}
    fields = {"logits": FIELDS["logits"]} | {codec.signal: codec.fields() for codec in CODECS}
    values = {
        "shard_size": len(SHOWN) + 1,
        "signals": signals,
        "fields": with_visual_source(fields),
        "extra": {"frames": {"fps": 2.0, "most": 4}},
        "format_version": 2,
    }
    return make_plan(store, **(values | changes))


def several_record(name: str) -> Record:
    """A record of `SHOWN`, all its arrays in it; ``visual_source`` is the sharer's."""
    tiles, times, seeds = SHOWN[name]
    rng = np.random.default_rng(len(name))
    said = make_record({"text": 0, "one": 3, "two": 4, "clip": 5, "two again": 6, "both": 7}[name])
    hashes = b"".join(image_hash(picture(seed)) for seed in seeds)
    rows = len(said["labels"])
    record = {entry.name: said[entry.name] for entry in FIELDS["logits"]}
    record |= {"labels": said["labels"], "image_hash": np.frombuffer(hashes, np.uint8).reshape(-1, 16)}
    record |= several_to_arrays(tiles, times, len(seeds))
    shared = np.random.default_rng(sum(seeds))  # signals of the pictures alone: equal where the pictures are
    record |= ANSWER.encode(looks(ANSWER, tiles, rows, rng), tiles=tiles)
    record |= TEXT.encode(looks(TEXT, tiles, rows + 2, rng), tiles=tiles)
    views = [sum(tile.token_count for tile in of_view(tiles, view)) for view in views_of(tiles)]
    columns = [shared.dirichlet(np.ones(size), 2) for size in views]
    maps = [np.tril(shared.random((2, size, size))) / size for size in views]
    record |= COLUMNS.encode(np.concatenate([np.zeros((2, 0)), *columns], axis=1))
    record |= MAPS.encode(maps if len(maps) > 1 else maps[0] if maps else np.zeros((2, 0, 0)), tiles=tiles)
    return record


def looks(
    codec: RowAttentionCodec, tiles: tuple[Tile, ...], rows: int, rng: np.random.Generator
) -> AttentionRows[np.ndarray]:
    """Random gaze on all cells, 0.6 of the attention of each row."""
    cells = sum(grid.token_count for grid in codec.cells_of(tiles))
    values = rng.dirichlet(np.ones(cells), (rows, codec.groups)) * 0.6 if cells else np.zeros((rows, codec.groups, 0))
    return AttentionRows(values.astype(np.float32), values.sum(axis=2).astype(np.float32))


def build_several(folder: Path, plan: Plan, names: tuple[str, ...] = tuple(SHOWN), *, change=None) -> Manifest:
    """A sealed cache of some of the samples, in shards as the plan says, and one that failed at the end."""
    plan = replace(plan, sample_count=len(names) + 1)
    write_plan(folder, plan)
    images = SharedImages(plan.all_fields)
    for index in range(plan.shard_count):
        writer, sharer = open_writer(plan.store, folder, index, plan.all_fields), ImageSharer(images)
        chosen = [(*names, FAILED[0])[place] for place in plan.shard_range(index)]
        for name in (name for name in chosen if name in SHOWN):
            record = several_record(name)
            record = sharer.share(record, images.content_key(record) if images.names else None)
            if change is not None:
                change(name, record)
            writer.append(name, {field.name: record[field.name] for field in plan.all_fields})
        finish_shard(writer, [FAILED] if FAILED[0] in chosen else [])
        writer.abort()
    return seal(folder, fidelity={"samples": 2, "kl": 0.25})


if __name__ == "__main__":
    for kind in ("zarr", "webdataset"):
        build_several(Path(sys.argv[1]) / f"cache-v2-{kind}", several_plan(kind))
