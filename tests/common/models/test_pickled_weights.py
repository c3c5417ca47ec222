"""Tensors of a pickled checkpoint are read one by one: the values that torch reads, and the file gone through a few times only."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from vlm_distill_cache.common.models import weight_files
from vlm_distill_cache.common.models.weight_files import read_weights


@pytest.fixture
def stored(tmp_path):
    base = torch.randn(40, 8)
    tensors = {f"layers.{number}.weight": torch.randn(16, 8) for number in range(40)}
    tensors |= {"embedding": base, "head": base, "rows": base[3:9], "columns": base.T, "empty": torch.zeros(0, 4)}
    tensors |= {"half": torch.randn(5).bfloat16(), "number": torch.tensor(7)}
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    return tmp_path, tensors


@pytest.fixture
def loads(monkeypatch):
    """How often a file was gone through."""
    seen = []
    load = torch.load

    def counted(*args, **options):
        seen.append(args)
        return load(*args, **options)

    monkeypatch.setattr(torch, "load", counted)
    return seen


@pytest.mark.parametrize("limit", [-1, 1000, 1 << 20])
def test_values_are_those_that_torch_reads_however_often_it_is_mapped(stored, monkeypatch, limit):
    folder, tensors = stored
    monkeypatch.setattr(weight_files, "_MAPPED_BYTES", limit)
    found = read_weights(folder)
    with ThreadPoolExecutor(4) as pool:
        values = dict(zip(found, pool.map(lambda value: value[...], found.values()), strict=True))
    assert values.keys() == tensors.keys()
    for name, value in values.items():
        assert (found[name].shape, found[name].dtype) == (tensors[name].shape, tensors[name].dtype)
        torch.testing.assert_close(value, tensors[name], rtol=0, atol=0)


def test_a_file_is_not_gone_through_for_each_of_its_tensors(stored, loads, monkeypatch):
    folder, _ = stored
    found = read_weights(folder)
    for value in found.values():
        value[...]
    assert len(loads) == 1
    monkeypatch.setattr(weight_files, "_MAPPED_BYTES", 1 << 11)
    read = sum(value[...].nbytes for value in found.values())
    assert 2 < len(loads) - 1 <= 1 + read / (1 << 11)


def test_what_is_done_to_a_tensor_is_not_done_to_one_of_another_name_or_that_is_read_later(stored):
    folder, tensors = stored
    found = read_weights(folder)
    held = {name: value[...] for name, value in found.items()}
    for name, value in held.items():
        value.fill_(99)
        torch.testing.assert_close(found[name][...], tensors[name], rtol=0, atol=0)
        for other in tensors.keys() - {name}:
            if other not in seen_before(held, name):
                torch.testing.assert_close(held[other], tensors[other], rtol=0, atol=0)


def seen_before(names, last):
    """The names in front of one."""
    order = [*names]
    return order[: order.index(last)]
