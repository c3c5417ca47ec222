"""CSV: what `csv` itself reads from the whole file is what a row read alone gives."""

import base64
import csv
import io
import json
import pickle

import PIL.Image
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vlm_distill_cache.common.errors import DataError, SampleError
from vlm_distill_cache.data.registry import open_dataset
from vlm_distill_cache.data.sources.csv_rows import CsvRows

CELL = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=6)


@given(
    st.lists(st.tuples(CELL, CELL, CELL), min_size=1, max_size=8),
    st.sampled_from([("x.csv", ","), ("x.csv", ";"), ("x.tsv", "\t")]),
    st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_row_equals_that_of_the_whole_file(tmp_path, rows, kind, encoding):
    name, delimiter = kind
    text = io.StringIO()
    writer = csv.writer(text, delimiter=delimiter)
    writer.writerow(["first", "second", "third"])
    writer.writerows(rows)
    (tmp_path / name).write_bytes(text.getvalue().encode(encoding))
    reader = csv.reader(io.StringIO(text.getvalue(), newline=""), delimiter=delimiter)
    expected = list(reader)[1:]
    found = CsvRows(tmp_path / name)
    list(found.scan(None))
    for index in reversed(range(len(found))):
        assert list(found.read(index).values()) == [cell if cell.strip() else None for cell in expected[index]]
    assert len(found) == len(expected)


def picture() -> bytes:
    buffer = io.BytesIO()
    PIL.Image.new("RGB", (5, 4)).save(buffer, "PNG")
    return buffer.getvalue()


def test_entries_with_paths_base64_lists_and_lines_in_cells(tmp_path):
    (tmp_path / "a.png").write_bytes(picture())
    talk = [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "A\nman"}]
    rows = [
        {"id": "1", "image": "a.png", "question": 'Say "x",\ny', "answer": "3"},
        {"id": "2", "image": base64.b64encode(picture() * 3000).decode(), "question": "What?", "answer": "a"},
        {"id": "3", "image": "a.png", "conversations": json.dumps(talk)},
        {"id": "4", "image": "a.png", "conversations": str(talk)},
    ]
    with (tmp_path / "x.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["id", "image", "question", "answer", "conversations"])
        writer.writeheader()
        writer.writerows(rows)
    dataset = pickle.loads(pickle.dumps(open_dataset(str(tmp_path / "x.csv"))))  # noqa: S301
    assert list(dataset.sample_ids) == ["1", "2", "3", "4"]
    assert dataset[0].turns[0].question == 'Say "x",\ny'
    assert [dataset[i].turns[0].answer for i in range(4)] == ["3", "a", "A\nman", "A\nman"]
    assert [dataset[i].images[0].load().size for i in (0, 1)] == [(5, 4)] * 2


def test_a_row_of_another_length_is_its_samples_error(tmp_path):
    (tmp_path / "x.csv").write_text("question,answer\nq,a\nq,a,b\n\nq2,a2\n")
    dataset = open_dataset(str(tmp_path / "x.csv"))
    assert len(dataset) == 3
    assert dataset[2].turns[0].answer == "a2"
    with pytest.raises(SampleError, match="has 3 cells, its header 2; quote cells"):
        dataset[1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "header has none of"),
        (b"a,b\n1,2\n", r"header has none of .* it has \['a', 'b'\]"),
        (b"question,answer\n", "holds no row"),
        (b"question,answer,answer\nq,a,b\n", "has answer twice"),
        (b"question,answer\nq,caf\xe9\n", "is not UTF-8.*iconv"),
    ],
)
def test_what_is_no_table_of_entries_is_refused(tmp_path, content, message):
    (tmp_path / "x.csv").write_bytes(content)
    with pytest.raises(DataError, match=message):
        open_dataset(str(tmp_path / "x.csv"))
