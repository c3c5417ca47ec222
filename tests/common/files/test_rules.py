"""A rule refuses exactly what breaks it, and the error names the document, the place, the value, and what to do."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

from vlm_distill_cache.common.errors import CacheFormatError
from vlm_distill_cache.common.files.atomic import parse_json
from vlm_distill_cache.common.files.rules import (
    FLAG,
    also,
    check,
    either,
    entries,
    items,
    maybe,
    misfit,
    number,
    one_of,
    record,
    text,
    whole,
)
from vlm_distill_cache.common.files.tensor_table import read_tensor_table

RULE = record(
    {"depth": whole(1, 9), "kind": one_of("a", "b")},
    {
        "sizes": items(either(number(0, 1), text(3, pattern="x+")), least=1, most=2),
        "names": maybe(entries(FLAG, most=2)),
        "pair": also(items(whole(0, 9), least=2, most=2), "a rising pair", lambda pair: pair[0] < pair[1]),
    },
)


def fits(value) -> bool:
    """The same rule written out by hand."""
    if type(value) is not dict or not {"depth", "kind"} <= value.keys() <= {"depth", "kind", "sizes", "names", "pair"}:
        return False
    sizes, names, pair = value.get("sizes", [0]), value.get("names"), value.get("pair", [0, 1])
    return (
        type(value["depth"]) is int and 1 <= value["depth"] <= 9 and value["kind"] in ("a", "b")
        and type(sizes) is list and len(sizes) in (1, 2)
        and all((type(s) in (int, float) and 0 <= s <= 1) or s in ("x", "xx", "xxx") for s in sizes)
        and (names is None or (type(names) is dict and len(names) < 3 and all(type(v) is bool for v in names.values())))
        and type(pair) is list and len(pair) == 2 and all(type(v) is int and 0 <= v <= 9 for v in pair) and pair[0] < pair[1]
    )  # fmt: skip


_LEAF = st.sampled_from([0, 1, 5, 10, -1, True, None, 0.5, float("nan"), "a", "xx", "xxxx", "", [], {}, 10**400])
_VALUES = st.fixed_dictionaries(
    {"depth": st.sampled_from([1, 5, True, 0, "a"]), "kind": st.sampled_from(["a", "b", "c", None])},
    optional={
        "sizes": st.lists(_LEAF, max_size=3),
        "names": st.none() | st.dictionaries(st.text(max_size=2), _LEAF, max_size=3),
        "pair": st.lists(st.integers(0, 10), max_size=3),
        "other": _LEAF,
    },
)


@given(_VALUES | _LEAF)
@settings(deadline=None)
def test_a_rule_fits_what_its_words_say(value):
    assert (misfit(RULE, value) is None) == fits(value)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], r"^p\.json: is \[\]; expected an object; do it$"),
        ({"depth": 1}, r"^p\.json: kind is missing; expected one of a, b; do it$"),
        ({"depth": True, "kind": "a"}, r"depth is True; expected a whole number from 1 to 9"),
        ({"depth": 1, "kind": "a", "sizes": [0, "y"]}, r"sizes\[1\] is 'y'; expected a number from 0 to 1 or "),
        ({"depth": 1, "kind": "a", "names": {"\x1b[2J": 1}}, r"names\.\\x1b\[2J is 1; expected true or false"),
        ({"depth": 1, "kind": "a", "pair": [3, 3]}, r"pair is \[3, 3\]; expected a rising pair"),
        ({"depth": 1, "kind": "a", "z": 1}, r"z is 1; expected no key but depth, kind, sizes, names, pair"),
        ({"depth": "A" * 10**7, "kind": "a"}, r"depth is 'A{20,40}\.\.\.A{20,40}'; expected"),
    ],
)
def test_the_error_says_where_what_and_what_to_do_in_a_few_words(value, message):
    with pytest.raises(CacheFormatError, match=message) as told:
        check(value, RULE, "p.json", remedy="do it")
    assert len(str(told.value)) < 250


def test_a_whole_number_of_thousands_of_digits_is_refused_in_our_words():
    with pytest.raises(CacheFormatError, match="a whole number of thousands of digits") as told:
        parse_json(b"9" * 5000, "here")
    assert "sys." not in str(told.value)


def _header(change):
    body = {"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}
    body["b"] = {"dtype": "F16", "shape": [4], "data_offsets": [24, 32]}
    change(body)
    data = json.dumps(body).encode()
    return len(data).to_bytes(8, "little") + data + bytes(32)


def test_a_table_of_tensors_is_what_the_library_reads(tmp_path):
    path = tmp_path / "t.safetensors"
    save_file({"one": np.zeros((2, 3), "f4"), "two": np.ones((4,), "f2"), "none": np.zeros((0, 5), "f4")}, path)
    with safe_open(path, "np") as file:
        assert read_tensor_table(path) == {name: tuple(file.get_tensor(name).shape) for name in file.keys()}  # noqa: SIM118


@pytest.mark.parametrize(
    "data",
    [
        b"", b"\0" * 7, (1 << 40).to_bytes(8, "little") + b"{}", b"\xff" * 8 + b"{}", bytes(8), b"\2" + bytes(7) + b"[]",
        _header(lambda body: body["b"].update(data_offsets=[0, 8])),
        _header(lambda body: body["b"].update(data_offsets=[16, 24])),
        _header(lambda body: body["a"].update(shape=[2, 1 << 39])),
        _header(lambda body: body["a"].update(dtype="I32")),
        _header(lambda body: body["a"].update(shape=[-2, -3])),
        _header(lambda body: body.pop("b")),
        _header(lambda body: body.update(__metadata__=[])),
    ],
)  # fmt: skip
def test_a_header_that_does_not_describe_its_file_is_refused(tmp_path, data):
    path = tmp_path / "t.safetensors"
    path.write_bytes(data)
    with pytest.raises(CacheFormatError, match=r"t\.safetensors: "):
        read_tensor_table(path)
