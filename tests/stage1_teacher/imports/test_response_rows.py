"""Rows of large and broken files are found by sample id, one at a time."""

import bz2
import gzip
import json
import lzma
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
        ("a.jsonl", gzip.compress(b"{}", mtime=0), "is compressed: unpack it first"),
        ("a.jsonl", "{}".encode("utf-16"), "a JSON object a line, in UTF-8"),
        ("a.json", json.dumps([row("a")]).encode(), r"one JSON list; write an object a line \(jq -c '.\[\]'"),
        ("a.json", json.dumps(row("a"), indent=1).encode(), "no row can be read: a.json:1 is no JSON"),
        ("a.jsonl", b"", "no row can be read"),
        ("a.jsonl", b"PAR1....", "is a parquet file"),
        ("a.jsonl", b"\x80\x02}q\x00.", "can run code and are not read here"),
        ("a.pt", b"PK\x03\x04...", "can run code and are not read here"),
        ("a.npz", b"PK\x03\x04...", "can run code and are not read here"),
        ("a.zip", b"PK\x03\x04...", "is a zip archive: unpack it first"),
        ("a.jsonl", bz2.compress(b"{}"), r"is compressed: unpack it first \(bunzip2\)"),
        ("a.jsonl", lzma.compress(b"{}"), r"is compressed: unpack it first \(unxz\)"),
        ("a.arrow", b"ARROW1\0\0...", r"is an Arrow file: write it as parquet"),
        ("a.arrow", b"\xff\xff\xff\xff\x10\x01", r"is an Arrow file: write it as parquet"),
        ("a.jsonl", b'{"id": "z"}\n{"x": 1}\n', r"none of the 2 rows .*: rows are of 'z', 'a.jsonl:2 \(no id\)', samples are 'a'"),
    ],
)  # fmt: skip
def test_files_of_another_kind_are_told(name: str, data: bytes, said: str, tmp_path: Path):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=said):
        read(tmp_path / name, "a")


def test_what_of_a_folder_is_not_read_is_named(tmp_path: Path, caplog):
    (tmp_path / "part").mkdir()
    for name in ("b.jsonl.gz", "c.json", "README.md", "compression_config.yaml", ".hidden"):
        (tmp_path / name).write_bytes(b"{}")
    with pytest.raises(
        DataError, match=r"no .parquet file is in this folder, but b.jsonl.gz, c.json, part/; name the files"
    ):
        read(tmp_path, "a")
    write_lines(tmp_path / "d.jsonl", [row("a")])
    with ServedRows.of([tmp_path], ["a"]) as rows:
        rows.report()
    assert f"3 files of the folder are not read: {tmp_path / 'b.jsonl.gz'}, {tmp_path / 'c.json'}" in caplog.text


def test_numbers_that_the_server_gave_are_no_ids_of_samples_where_some_are_of_none(tmp_path: Path, caplog):
    path = write_lines(tmp_path / "d.jsonl", [{"request_id": str(number), **BODY} for number in range(4)])
    with pytest.raises(
        DataError, match=r"3 rows are of samples by request_id .* 1 are of none \(d.jsonl:1 has 0\).*sample_id"
    ):
        read(path, "1", "2", "3", "4")
    with ServedRows.of([path], list("0123")) as rows:
        rows.report()
    assert "4 rows are joined with samples by request_id alone" in caplog.text
    caplog.clear()
    # An id that nobody counts is the sample's.
    with ServedRows.of(
        [write_lines(path, [{"request_id": f"s{number}", **BODY} for number in range(4)])], ["s1"]
    ) as rows:
        rows.report()
    assert "alone" not in caplog.text


@pytest.mark.parametrize("key", ["custom_id", "sample_id", "id"])
def test_a_servers_number_beside_another_id_is_none(key: str, tmp_path: Path, caplog):
    lines = [{"request_id": str(number), key: str(number + 1), **BODY} for number in range(4)]
    with ServedRows.of([write_lines(tmp_path / "d.jsonl", lines)], ["1", "2"]) as rows:
        assert [rows.read(name)[key] for name in "12"] == ["1", "2"]
        rows.report()
    assert rows.strangers.first == ["3", "4"]
    assert "alone" not in caplog.text


def test_cells_of_json_lines_may_be_texts_of_json_too(tmp_path: Path):
    text = json.dumps(BODY["prompt_logprobs"])
    rows = [
        {"id": "a", "prompt_logprobs": text}, {"id": "b", "response": {"body": {"prompt_logprobs": text}}},
        {"id": "c", "response": json.dumps({"prompt_logprobs": text})}, {"id": "d", "text": "{not json"},
    ]  # fmt: skip
    path = write_lines(tmp_path / "d.jsonl", rows)
    assert [body["prompt_logprobs"] for body in read(path, *"abc")] == [BODY["prompt_logprobs"]] * 3
    assert read(path, "d")[0]["text"] == "{not json"


def test_rows_whose_ids_are_of_no_sample_are_not_said_to_lack_tokens(tmp_path: Path):
    path = write_lines(tmp_path / "d.jsonl", [{"request_id": "x", "prompt_token_ids": [1, 5], **BODY}])
    with pytest.raises(
        DataError, match=r"none of the 1 rows is of a sample of the data: rows are of 'x', samples are 'a'"
    ):
        read(path, "a")


def test_folders_and_files_given_twice(tmp_path: Path):
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
