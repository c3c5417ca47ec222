"""Rows of large and broken files are found by sample id, one at a time."""

import gzip
import json
import tracemalloc
from pathlib import Path

import pytest
from fake_server import write_lines

from vlm_distill_cache.common.errors import DataError, SampleError
from vlm_distill_cache.stage1_teacher.imports.rows import ServedRows

BODY = {"prompt_logprobs": [None, {"5": {"logprob": -1.0}}], "model": "m"}


def row(name, **more) -> dict:
    return {"custom_id": name, "response": {"status_code": 200, "body": {**BODY, **more}}, "error": None}


def read(path, *ids: str) -> list:
    with ServedRows.of([path], ids) as rows:
        return [rows.read(name) for name in ids]


@pytest.mark.parametrize("key", ["custom_id", "sample_id", "id", "request_id", "rid"])
def test_ids_go_by_several_names_and_are_numbers_too(key: str, tmp_path: Path):
    path = write_lines(tmp_path / "d.jsonl", [{key: "a", **BODY}, {key: 17, **BODY}])
    assert read(path, "17", "a") == [{key: 17, **BODY}, {key: "a", **BODY}]


def test_a_samples_id_is_preferred_to_the_servers_own(tmp_path: Path):
    rows = [
        {"id": "batch_1", **row("a", id="chatcmpl-1")},
        {"id": "chatcmpl-2", "metadata": {"sample_id": "b"}, **BODY},
    ]
    path = write_lines(tmp_path / "d.jsonl", rows)
    assert [body["id"] for body in read(path, "a", "b")] == ["chatcmpl-1", "chatcmpl-2"]
    meta = write_lines(tmp_path / "s.jsonl", [{"text": "", "meta_info": {"id": "c"}}])
    assert read(meta, "c") == [{"text": "", "meta_info": {"id": "c"}}]


def test_what_of_a_file_is_not_used_is_told(tmp_path: Path, caplog):
    path = tmp_path / "d.jsonl"
    deep = "[" * 100_000
    path.write_text(
        f"{json.dumps(row('a'))}\n\nnot json\n[1]\n{deep}\n{json.dumps(row('other'))}\n{json.dumps(row('b'))[:-9]}"
    )
    with ServedRows.of([path], ["a", "b"]) as rows:
        rows.report()
        assert rows.read("a") == BODY
        with pytest.raises(SampleError, match="no row of the files has its id"):
            rows.read("b")
    assert "4 rows cannot be read, so their samples count as missing: d.jsonl:3 is no JSON: " in caplog.text
    assert "1 rows are of no sample of the data, for example of 'other'" in caplog.text
    assert rows.broken.count == 4
    path.write_text(path.read_text().splitlines()[-1])
    with pytest.raises(DataError, match=r"d.jsonl:1 is no JSON \(the file ends in the middle of it\)"):
        read(path, "b")


def test_responses_inside_and_texts_of_json(tmp_path: Path):
    text = json.dumps(BODY)
    rows = [
        {"id": "a", "result": BODY}, {"id": "b", "response": text}, {"id": "c", "response": {"body": text}},
        {"id": "d", "output": {"response": BODY}}, {"id": "e", "output": "its text", **BODY},
    ]  # fmt: skip
    path = tmp_path / "d.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + write_lines(path, rows).read_bytes())
    assert read(path, *"abcd") == [BODY] * 4
    assert read(path, "e")[0]["prompt_logprobs"] == BODY["prompt_logprobs"]


def test_the_order_of_files_does_not_matter(tmp_path: Path):
    one, two = (write_lines(tmp_path / f"{name}.jsonl", [row(name)]) for name in "ab")
    found = [ServedRows.of(files, ["a", "b"]).digest for files in ([one, two], [two, one], [tmp_path])]
    assert len(set(found)) == 1
    write_lines(two, [row("b", more=1)])
    assert ServedRows.of([one, two], ["a", "b"]).digest != found[0]


def test_repeated_requests(tmp_path: Path):
    failed = {"custom_id": "a", "response": None, "error": {"message": "busy"}}
    path = write_lines(
        tmp_path / "d.jsonl", [failed, row("a"), row("a"), row("b"), row("b", usage=1), {**failed, "custom_id": "c"}]
    )
    assert read(path, "a") == [BODY]
    with pytest.raises(SampleError, match=r"two responses that differ have its id: d.jsonl:4 and d.jsonl:5; keep one"):
        read(path, "b")
    with pytest.raises(SampleError, match=r"answered with an error: \{'message': 'busy'\}"):
        read(path, "c")


def test_parquet_rows_are_those_of_the_lines(tmp_path: Path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    entries = [None, [(5, -1.0), (6, -2.0)]]
    table = pa.table({
        "sample_id": ["a", "b", "c"], "model": ["m"] * 3, "text": ['{"prompt_logprobs": [null]}', "x", "{no"],
        "prompt_logprobs": pa.array([entries] * 3, pa.list_(pa.map_(pa.int64(), pa.float64()))),
    })  # fmt: skip
    pq.write_table(table, tmp_path / "d.parquet", row_group_size=2)
    with ServedRows.of([tmp_path], ["c", "a", "zz"]) as rows:
        assert rows.read("c")["prompt_logprobs"] == entries
        assert rows.read("c")["text"] == "{no"
        assert rows.read("a")["text"] == {"prompt_logprobs": [None]}
        assert rows.models == {"m": 2}
        assert rows.strangers.first == ["b"]
    data = (tmp_path / "d.parquet").read_bytes()
    for name, damaged in (
        ("cut", data[: len(data) // 2]),
        ("empty", b""),
        ("odd", data[:60] + b"\xff" * 40 + data[100:]),
    ):
        path = tmp_path / "broken" / f"{name}.parquet"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=rf"{name}.parquet cannot be read as a parquet file: .*write it again"):
            read(path, "a")


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("a.jsonl", gzip.compress(b"{}"), "is compressed: unpack it first"),
        ("a.jsonl", "{}".encode("utf-16"), "a JSON object a line, in UTF-8"),
        ("a.json", json.dumps([row("a")]).encode(), r"one JSON list; write an object a line \(jq -c '.\[\]'"),
        ("a.json", json.dumps(row("a"), indent=1).encode(), "no row can be read: a.json:1 is no JSON"),
        ("a.jsonl", b"", "no row can be read"),
        ("a.jsonl", b"PAR1....", "is a parquet file"),
        ("a.jsonl", b"\x80\x02}q\x00.", "expected|is not"),
        ("a.jsonl", b'{"id": "z"}\n{"x": 1}\n', r"none of the 2 rows .*: rows are of 'z', 'a.jsonl:2 \(no id\)', samples are 'a'"),
    ],
)  # fmt: skip
def test_files_of_another_kind_are_told(name: str, data: bytes, said: str, tmp_path: Path):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=said):
        read(tmp_path / name, "a")


def test_folders_and_files_given_twice(tmp_path: Path):
    with pytest.raises(DataError, match=r"no .jsonl and no .parquet"):
        read(tmp_path, "a")
    path = write_lines(tmp_path / "d.jsonl", [row("a")])
    with pytest.raises(DataError, match="given twice"):
        ServedRows.of([path, tmp_path], ["a"])


def test_a_large_file_is_not_held_in_memory(tmp_path: Path):
    path = tmp_path / "d.jsonl"
    with path.open("w") as handle:
        handle.writelines(f"{json.dumps(row(str(number), pad='x' * 20_000))}\n" for number in range(1000))
    tracemalloc.start()
    with ServedRows.of([path], [str(number) for number in range(1000)]) as rows:
        assert rows.read("999")["pad"][:1] == "x"
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < path.stat().st_size / 4
