"""A shard read without a line of ours: by plain zarr, tarfile, zstd and safetensors, and by the words of `common.cache.schema`."""

import io
import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from vlm_distill_cache.common.cache.plan import Plan
from vlm_distill_cache.common.cache.schema import BASE_FIELDS
from vlm_distill_cache.common.cache.stores import finish_shard, open_writer
from vlm_distill_cache.common.codecs.live import RowAttention, select_entries
from vlm_distill_cache.common.codecs.logits import LogitCodec
from vlm_distill_cache.common.codecs.row_attention import RowAttentionCodec

READER = """
import io, json, math, sys, tarfile
import numpy as np

root, store, steps = sys.argv[1], sys.argv[2], sys.argv[3] == "True"
temperatures = [1.0, 2.0]


def records():
    if store == "zarr":
        import zarr

        group = zarr.open_group(f"{root}/shards/00000.zarr", mode="r")
        names = [name for name in group if not name.endswith("_offsets")]
        for i in range(group.attrs["samples"]):
            part = {n: group[n][group[n + "_offsets"][i] : group[n + "_offsets"][i + 1]] for n in names}
            yield bytes(part.pop("sample_ids")).decode(), part
    else:
        from numcodecs.zstd import Zstd
        from safetensors.numpy import load

        with tarfile.open(f"{root}/shards/00000.tar") as tar:
            for member in tar:
                plain = bytes(Zstd().decode(tar.extractfile(member).read()))
                header = json.loads(plain[8 : 8 + int.from_bytes(plain[:8], "little")])
                yield header["__metadata__"]["sample_id"], load(plain)


def gap(code):
    if code in (0, 254, 255):
        return {0: 0.0, 254: 24.0, 255: math.inf}[code]
    low, high = 0.0, 24.0
    for _ in range(60):
        g = (low + high) / 2
        found = 254 * (0.7 * (1 - math.exp(-g / 3)) / (1 - math.exp(-8)) + 0.3 * math.log(1 + g) / math.log(25))
        low, high = (g, high) if found < code else (low, g)
    return low


out = {}
for name, record in records():
    entry, rows = 0, []
    for a, count in enumerate(record["entry_count"].tolist()):
        held = record["log_gap"][entry : entry + count].tolist()
        codes = [sum(held[: i + 1]) % 256 for i in range(count)] if steps else held
        gaps = [gap(c) for c in codes]
        by_temperature = []
        for column, t in enumerate(temperatures):
            tail = math.exp(float(record["tail_logmass"][a, column]))
            weights = [math.exp(-g / t) for g in gaps]
            own = math.exp(float(record["top_logprob"][a]))
            scale = own if t == 1 else (1 - tail) / sum(weights)
            by_temperature.append(([scale * w for w in weights], tail))
        rows.append((record["token_ids"][entry : entry + count].tolist(), by_temperature))
        entry += count
    codes = record["answer_attention"].astype(float)
    cells = np.where(codes > 0, np.exp((codes - 255) * 12 / 254), 0)
    cells *= (record["answer_image_mass"].astype(float) / np.maximum(cells.sum(2), 1e-30))[..., None]
    out[name] = (rows, cells.tolist())
assert not any(m.split(".")[0] in ("common", "data", "stage1_teacher", "torch") for m in sys.modules)
print(json.dumps(out))
"""


@pytest.mark.parametrize("store", ["zarr", "webdataset"])
@pytest.mark.parametrize("steps", [True, False])
def test_the_words_of_the_schema_are_enough_to_get_a_teachers_probabilities_back(store, steps, tmp_path):
    generator = torch.Generator().manual_seed(7)
    logits = LogitCodec(floor=1e-3, min_k=4, max_k=16, gap_steps=steps)
    attention = RowAttentionCodec(grid=(2, 3), groups=2)
    fields = {"logits": logits.fields(), "answer_attention": attention.fields()}
    signals = {"logits": logits.to_dict(), "answer_attention": attention.to_dict()}
    plan = Plan(store=store, sample_count=2, shard_size=2, signals=signals, fields=fields, fingerprints={})
    dense, cells = {}, {}
    writer = open_writer(store, tmp_path, 0, plan.all_fields)
    for name, rows in (("set/é.1", 5), ("b", 3)):
        dense[name] = 4 * torch.randn(rows, 50, generator=generator)
        cells[name] = torch.rand(rows, 2, 6, generator=generator) / 12
        labels = torch.randint(0, 50, (rows,), generator=generator)
        base = {
            "image_hash": np.ones((1, 16), np.uint8),
            "labels": labels.numpy().astype(np.uint32),
            "tiles": np.array([[2, 3, 0, 0, 1, 1]], np.float32),
        }
        kept = logits.encode(select_entries(logits, dense[name], labels))
        writer.append(name, base | kept | attention.encode(RowAttention.from_cells(cells[name])))
    finish_shard(writer)
    assert set(base) == {field.name for field in BASE_FIELDS}

    (tmp_path / "reader.py").write_text(READER)
    command = [sys.executable, "-I", str(tmp_path / "reader.py"), str(tmp_path), store, str(steps)]
    found = json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout)
    assert set(found) == set(dense)
    for name, (rows, looked) in found.items():
        assert np.allclose(looked, cells[name].numpy(), rtol=0.06, atol=1e-6)
        for (ids, by_temperature), row in zip(rows, dense[name].double(), strict=True):
            for temperature, (probabilities, tail) in zip((1.0, 2.0), by_temperature, strict=True):
                wanted = (row / temperature).softmax(0)
                assert np.allclose(probabilities, wanted[ids].numpy(), rtol=0.16, atol=0)  # of the smallest
                assert np.allclose(probabilities, wanted[ids].numpy(), rtol=0, atol=0.004)
                rest = 1 - float(wanted[ids].sum())
                assert math.isclose(tail, rest, rel_tol=0.01, abs_tol=1e-6)


def test_a_tar_is_what_the_webdataset_package_expects(tmp_path):
    from numcodecs.zstd import Zstd
    from safetensors.numpy import load
    from webdataset.tariterators import group_by_keys, tar_file_expander

    codec = LogitCodec.from_preset("lean")
    plan = Plan(
        store="webdataset", sample_count=1, shard_size=1, signals={"logits": codec.to_dict()},
        fields={"logits": codec.fields()}, fingerprints={},
    )  # fmt: skip
    labels = torch.tensor([4])
    record = codec.encode(select_entries(codec, torch.arange(9.0)[None], labels)) | {
        "image_hash": np.zeros((1, 16), np.uint8),
        "labels": labels.numpy().astype(np.uint32),
        "tiles": np.zeros((0, 6), np.float32),
    }
    writer = open_writer("webdataset", tmp_path, 0, plan.all_fields)
    writer.append("one", record)
    finish_shard(writer)
    stream = io.BytesIO((tmp_path / "shards" / "00000.tar").read_bytes())
    [sample] = group_by_keys(tar_file_expander([{"url": "x", "stream": stream}]))
    arrays = load(bytes(Zstd().decode(sample["safetensors.zst"])))
    assert {name: array.tobytes() for name, array in arrays.items()} == {
        name: array.tobytes() for name, array in record.items()
    }
