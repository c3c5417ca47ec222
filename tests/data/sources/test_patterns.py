"""Names of several files: what a pattern means, and which files are parts of one set."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm_distill_cache.common.errors import DataError
from vlm_distill_cache.common.hub import HubName
from vlm_distill_cache.data.sources.patterns import are_parts, file_of_repository, find_files, matching, refuse_gaps

COUNTS = st.integers(1, 12)
WIDTHS = st.sampled_from([0, 3, 5])
BETWEEN = st.sampled_from(["-of-", "_of_"])


def numbered(count, width, of, first=0):
    return [f"data/train-{i:0{width}d}{of}{count:0{width}d}.json" for i in range(first, first + count)]


@given(COUNTS, WIDTHS, BETWEEN, st.integers(0, 1), st.randoms())
def test_a_numbered_set_is_whole_or_refused(count, width, of, first, random):
    paths = numbered(count, width, of, first)
    random.shuffle(paths)
    refuse_gaps(paths, "x")
    for gone in range(count):
        left = paths[:gone] + paths[gone + 1 :]
        if left:
            with pytest.raises(
                DataError, match=rf"x: 1 of {count} files are missing, the first is data/train-.*; finish"
            ):
                refuse_gaps(left, "x")


@given(COUNTS, COUNTS, WIDTHS)
def test_the_same_data_in_another_number_of_files_is_refused(one, other, width):
    paths = [*numbered(one, width, "-of-"), *numbered(other, width, "-of-")]
    if one == other:
        refuse_gaps(paths, "x")
        return
    with pytest.raises(
        DataError, match=r"x holds data/train-\*-of-.* and data/train-\*-of-.*: data that were written twice"
    ):
        refuse_gaps(paths, "x")


def test_a_glob_or_a_folder_hides_no_gap_and_a_file_may_be_named(tmp_path):
    pytest.importorskip("webdataset")
    for number in (0, 2):
        (tmp_path / f"x-0000{number}-of-00003.tar").touch()
    for pattern in ("*.tar", "x-*-of-00003.tar", "x-0000?-of-00003.tar", ""):
        with pytest.raises(DataError, match=r"1 of 3 files are missing, the first is .*x-00001-of-00003\.tar"):
            find_files(str(tmp_path / pattern), ".tar")
    for pattern in ("x-0000[02]-of-00003.tar", "x-{00000,00002}-of-00003.tar"):
        assert len(find_files(str(tmp_path / pattern), ".tar")) == 2
    assert len(find_files(str(tmp_path / "x-00002-of-00003.tar"), ".tar")) == 1


@pytest.mark.parametrize(
    ("paths", "parts"),
    [
        (["x-00.json", "x-01.json"], True),
        (["x/0.json", "x/1.json", "x/2.json"], True),
        (["part1.json", "part2.json"], True),
        (["a_shard_0.csv", "a_shard_1.csv"], True),
        (["x-0-of-2.json", "x-1-of-2.json"], True),
        (["train-00000-of-00002-0123456789abcdef.json", "train-00001-of-00002-fedcba9876543210.json"], True),
        ([f"part-{i:05d}.json" for i in range(12)], True),
        (["llava_instruct_150k.json", "llava_instruct_80k.json"], False),
        (["llava_v1.json", "llava_v2.json"], False),
        (["stage1.json", "stage2.json"], False),
        (["x-00.json", "x-02.json"], False),
        (["x-00.json", "y-01.json"], False),
        (["a/x-00.json", "b/x-01.json"], False),
        (["2017.json", "2018.json"], False),
        (["a.json", "b.json"], False),
        (["detail_23k.json", "conversation_58k.json", "complex_77k.json"], False),
    ],
)
def test_parts_of_a_set_differ_in_a_number_that_counts(paths, parts):
    assert are_parts(paths) is parts


@pytest.mark.parametrize(
    "pattern", ["*.json", "a/*.json", "a/{x,y}.json", "a/x.json", "a/[xy].json", "a/?.json", "n.json"]
)
def test_a_pattern_means_in_a_list_what_it_means_in_a_folder(tmp_path, pattern):
    names = ["x.json", "a/x.json", "a/y.json", "a/z.csv", "a/b/x.json", "a/xx.json"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    try:
        expected = [path.relative_to(tmp_path).as_posix() for path in find_files(str(tmp_path / pattern), ".json")]
    except DataError:
        expected = []
    assert matching(pattern, names) == expected


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("org/name/a.json", (HubName("org/name"), "a.json")),
        ("org/name@v1/data/*.parquet", (HubName("org/name", "v1"), "data/*.parquet")),
        ("org/name@refs/pr/3/a.jsonl", (HubName("org/name", "refs/pr/3"), "a.jsonl")),
        ("org/name/data/a.txt", None),
        ("org/name", None),
        ("org/a.json", None),
        ("./org/name/a.json", None),
        ("/org/name/a.json", None),
        ("org/name/../a.json", None),
        ("here/name/a.json", None),
    ],
)
def test_a_file_in_a_repository_is_told_from_a_path(tmp_path, given, expected):
    (tmp_path / "here").mkdir()
    assert file_of_repository(given, tmp_path) == expected
    assert file_of_repository("here/name/a.json", Path("/")) == (HubName("here/name"), "a.json")
