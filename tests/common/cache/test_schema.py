"""A record has exactly its fields, dtypes and matching lengths."""

import numpy as np
import pytest
from cache_factory import FIELDS, make_record

from vlm_distill_cache.common.cache.schema import BASE_FIELDS, IGNORE_INDEX, Field, check_fields, check_record
from vlm_distill_cache.common.errors import CacheFormatError

ALL = BASE_FIELDS + FIELDS["logits"] + FIELDS["visual_map"]


def test_records_of_every_kind_are_accepted():
    for position in range(10):
        check_record(make_record(position), ALL)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("labels", None, r"missing fields \['labels'\]"),
        ("labels", lambda a: a.astype(np.int64), "labels has dtype int64; expected u4"),
        ("labels", lambda a: a.astype(">u4"), "labels has dtype >u4"),
        ("labels", lambda a: list(a), "labels has dtype list"),
        ("labels", lambda a: a[:, None], r"labels has shape \(\d+, 1\)"),
        ("tail_logmass", lambda a: a[:, :1], r"tail_logmass has shape"),
        ("entry_count", lambda a: a[:-1], "entry_count has .* along its row axis, labels has"),
        ("image_hash", lambda a: np.concatenate([a, a]), "2 along its sample axis; expected 1"),
        ("visual_map", lambda a: a[:-1], "not N\\(N\\+1\\)/2"),
        ("entry_count", lambda a: a + np.uint8(1), "entry_count sums to"),
    ],
)
def test_violations_are_named(name, change, message):
    record = make_record(5)
    if change is None:
        del record[name]
    else:
        record[name] = change(record[name])
    with pytest.raises(CacheFormatError, match=message):
        check_record(record, ALL, "sample 'x'")


def test_a_map_alone_must_be_triangular():
    field = FIELDS["visual_map"][1]
    check_record({"visual_map": np.zeros((10, 2), np.uint8)}, [field])
    with pytest.raises(CacheFormatError, match="11 pairs"):
        check_record({"visual_map": np.zeros((11, 2), np.uint8)}, [field])


def test_fields_round_trip_and_refuse_nonsense():
    for field in ALL:
        assert Field.from_dict(field.to_dict()) == field
        assert field.empty().shape == (0, *field.trailing)
    good = {"name": "a", "dtype": "u1", "axis": "row", "trailing": []}
    for change in (
        {"name": "A"}, {"name": "../a"}, {"name": "sample_ids"}, {"name": "a_offsets"}, {"name": 3},
        {"dtype": "O"}, {"dtype": "<u1"}, {"axis": "time"}, {"trailing": [0]}, {"trailing": [1 << 40]},
        {"trailing": [2.0]}, {"trailing": 3}, {"extra": 1}, {"trailing": [1] * 9},
    ):  # fmt: skip
        with pytest.raises(CacheFormatError):
            Field.from_dict(good | change)
    with pytest.raises(CacheFormatError, match="appears twice"):
        check_fields([BASE_FIELDS[0], BASE_FIELDS[0]])


def test_position_convention_of_the_docstring():
    # <s> USER: hi ASSISTANT: yes </s>: row p predicts token p + 1; answers are yes and </s>.
    tokens, is_answer = [1, 10, 11, 12, 13, 2], [False, False, False, False, True, True]
    labels = [tokens[p + 1] if p + 1 < len(tokens) and is_answer[p + 1] else IGNORE_INDEX for p in range(len(tokens))]
    assert labels == [-100, -100, -100, 13, 2, -100]
    assert [label for label in labels if label != IGNORE_INDEX] == [13, 2]
