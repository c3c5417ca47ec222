"""Data sets by their names on the hub: whole, by parts, streamed, offline; the client library is the real one."""

import io
import json
import multiprocessing
import pickle
from types import SimpleNamespace

import huggingface_hub.constants
import PIL.Image
import pytest
from dataset_hub import DatasetHub
from hub_server import TOKEN, use_models
from servers import Fault

from vlm_distill_cache.common.errors import DataError, TransferError
from vlm_distill_cache.data.registry import open_dataset
from vlm_distill_cache.data.sources import parquet as parquet_module
from vlm_distill_cache.data.sources import parquet_rows

datasets = pytest.importorskip("datasets")
pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # of the hub's library


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with DatasetHub(tmp_path) as server:
        use_models(monkeypatch, server.url, tmp_path / "home" / "hub")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_PROGRESS_BARS", True)
        yield server


def png(size: int) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.effect_noise((size, size), 90).convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()


def parquet(*texts: str, group: int = 2, **how) -> bytes:
    buffer = io.BytesIO()
    pictures = [{"bytes": png(32 + i), "path": None} for i in range(len(texts))]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = {"image": pa.array(pictures, kind), "question": [f"{t}?" for t in texts], "answer": list(texts)}
    pq.write_table(pa.table(table), buffer, row_group_size=group, **how)
    return buffer.getvalue()


README = b"""---
configs:
- config_name: one
  data_files: [{split: train, path: one/train-*}, {split: test, path: one/test-*}]
- config_name: two
  data_files: two/*
---
"""
PARTS = {
    "README.md": README,
    "one/train-00000-of-00002.parquet": parquet("a", "b", "c"),
    "one/train-00001-of-00002.parquet": parquet("d"),
    "one/test-00000-of-00001.parquet": parquet("t"),
    "two/x.parquet": parquet("z"),
}


def answers(dataset):
    return [sample.turns[0].answer for sample in dataset]


def fetched(hub):
    """Files whose content was asked for."""
    return {path.partition("/resolve/")[2].partition("/")[2] for method, path, _ in hub.requests
            if method == "GET" and "/resolve/" in path}  # fmt: skip


def test_a_configuration_and_a_split_are_downloaded_alone_and_their_commit_is_told(hub):
    commit = hub.publish("org/name", PARTS)
    dataset = open_dataset("org/name:name=one")
    assert answers(dataset) == ["a", "b", "c", "d"]
    assert dataset[2].images[0].load().size == (34, 34)
    assert dataset.name == "org/name:one"
    assert dataset.origin == {"repository": "org/name", "revision": commit, "config": "one"}
    assert fetched(hub) == {"README.md", *(path for path in PARTS if path.startswith("one/train"))}
    assert answers(open_dataset("org/name:name=one", split="test")) == ["t"]
    assert answers(open_dataset("org/name:name=one,split=test")) == ["t"]
    assert answers(open_dataset("org/name:name=two", split="test")) == ["z"]
    with pytest.raises(
        DataError, match=r"org/name holds several data sets; it has one, two: name one, DATA=org/name:name=one"
    ):
        open_dataset("org/name")
    with pytest.raises(DataError, match=r"no data set 'three'; it has one, two"):
        open_dataset("org/name:name=three")
    with pytest.raises(DataError, match=r"no split 'dev'; it has test, train: name one, DATA=org/name:name=one,split="):
        open_dataset("org/name:name=one,split=dev")


def test_a_revision_stays_what_it_was(hub):
    first = hub.publish("org/name", {"x.parquet": parquet("old")})
    hub.publish("org/name", {"x.parquet": parquet("new")})
    hub.publish("org/name", {"default/train/0000.parquet": parquet("hub")}, ref="refs/convert/parquet")
    assert answers(open_dataset("org/name")) == ["new"]
    assert answers(open_dataset(f"org/name@{first}")) == ["old"]
    assert answers(open_dataset("org/name@refs/convert/parquet")) == ["hub"]
    with pytest.raises(DataError, match="no branch, tag or commit 'v9'"):
        open_dataset("org/name@v9")


def test_streaming_reads_ranges_and_gives_the_same_data(hub):
    texts = [f"t{i}" for i in range(40)]
    hub.publish("org/name", {"x.parquet": parquet(*texts, group=4)})
    streamed = open_dataset("org/name:streaming=true")
    size = len(hub._commits["org/name"][streamed.origin["revision"]]["x.parquet"])
    assert answers(streamed) == texts
    assert streamed[33].images[0].load().size == (65, 65)
    sent = sum(count for path, count in hub.sent.items() if "/resolve/" in path)
    assert sent < size / 2  # the texts, the footer and one row group of pictures
    copy = pickle.loads(pickle.dumps(streamed))  # noqa: S301
    assert answers([copy[39], copy[0]]) == ["t39", "t0"]
    whole = open_dataset("org/name")
    assert whole.fingerprint() == streamed.fingerprint()
    assert list(whole.sample_ids) == list(streamed.sample_ids)
    assert whole.name == streamed.name
    assert whole.origin == streamed.origin


def test_a_large_row_group_is_not_streamed_as_a_whole(hub, monkeypatch):
    texts = [f"t{i}" for i in range(60)]
    content = parquet(*texts, group=60, data_page_size=10_000, use_dictionary=False, write_batch_size=2)
    hub.publish("org/name", {"x.parquet": content})
    monkeypatch.setattr(parquet_rows, "BLOCK_BYTES", 30_000)
    monkeypatch.setattr(parquet_module, "BUFFER", 10_000)
    streamed = open_dataset("org/name:streaming=true")
    before = sum(hub.sent.values())
    assert streamed[1].images[0].load().size == (33, 33)
    assert sum(hub.sent.values()) - before < len(content) / 3
    for place in (50, 2, 59, 58):
        assert streamed[place].images[0].load().size == (32 + place,) * 2
        assert streamed[place].turns[0].answer == texts[place]


def _answer(dataset, index, queue):
    queue.put((dataset[index].turns[0].answer, dataset[index].images[0].load().size))


def test_a_forked_process_streams_too(hub):
    hub.publish("org/name", {"x.parquet": parquet("a", "b", "c", group=1)})
    streamed = open_dataset("org/name:streaming=true")
    assert streamed[0].images[0].load().size == (32, 32)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=_answer, args=(streamed, 2, queue))
    process.start()
    assert queue.get(timeout=60) == ("c", (34, 34))
    process.join()


def test_a_commit_is_read_again_where_no_revision_is_named(hub, tmp_path):
    first = hub.publish("org/name", {"x.parquet": parquet("old")})
    second = hub.publish("org/name", {"x.parquet": parquet("new")})
    commits = {"org/name": first}
    assert answers(open_dataset("org/name", commits=commits)) == ["old"]
    assert answers(open_dataset("org/name:split=train", commits=commits)) == ["old"]
    assert answers(open_dataset("org/name@main", commits=commits)) == ["new"]
    (tmp_path / "mixture.yaml").write_text("- org/name\n")
    mixture = open_dataset(str(tmp_path / "mixture.yaml"), commits=commits)
    assert answers(mixture) == ["old"]
    part = {"name": "org/name", "samples": 1, "repository": "org/name", "revision": first}
    assert mixture.origin == {"mixture": [part]}
    assert open_dataset("org/name").origin["revision"] == second


def test_a_cache_tells_the_commits_of_its_data():
    from vlm_distill_cache.stage2_student.training.preparation import _commits_of

    def commits(**data):
        return _commits_of(SimpleNamespace(plan=SimpleNamespace(data=data)))

    one, other = ({"repository": f"org/{name}", "revision": name * 40} for name in "ab")
    expected = {"org/a": "a" * 40, "org/b": "b" * 40}
    assert commits(**one) == {"org/a": "a" * 40}
    assert commits(mixture=[one, {"name": "x.json"}, other]) == expected
    assert commits(parts=[one, other]) == expected
    assert commits(name="shapes") == {}


def test_a_hub_that_breaks_off_is_no_fault_of_a_sample(hub, monkeypatch):
    hub.publish("org/name", {"x.parquet": parquet("a", "b", group=1)})
    streamed = open_dataset("org/name:streaming=true")
    hub.always = Fault(status=403)
    with pytest.raises(DataError, match=r"row group 1, cannot be read.*run the same command again"):
        streamed[1]


def test_offline_the_cache_is_read_and_what_it_lacks_is_said(hub, monkeypatch):
    commit = hub.publish("org/name", PARTS)
    hub.publish("org/other", {"x.parquet": parquet("a")})
    online = open_dataset("org/name:name=one")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    before = len(hub.requests)
    offline = open_dataset("org/name:name=one")
    assert answers(offline) == answers(online)
    assert offline.origin == online.origin
    assert offline.fingerprint() == online.fingerprint()
    for spec, message in (
        ("org/name:name=two", "only a part of it is in the hub's cache.*Run the same command with a network"),
        ("org/other", "not in the hub's cache.*HF_HUB_OFFLINE.*hf download org/other --repo-type dataset"),
        ("org/name:name=one,streaming=true", "streaming=true reads from the hub, which HF_HUB_OFFLINE switches off"),
    ):
        with pytest.raises(DataError, match=message):
            open_dataset(spec)
    assert len(hub.requests) == before
    snapshot = huggingface_hub.constants.HF_HUB_CACHE + f"/datasets--org--name/snapshots/{commit}"
    for folder in (snapshot, huggingface_hub.constants.HF_HUB_CACHE + "/datasets--org--name"):
        found = open_dataset(f"{folder}:name=one")
        assert (found.name, found.origin, found.fingerprint()) == (online.name, online.origin, online.fingerprint())


def test_a_hub_that_cannot_be_reached_leaves_what_is_there(hub, monkeypatch, caplog):
    hub.publish("org/name", {"x.parquet": parquet("a")})
    online = open_dataset("org/name")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert open_dataset("org/name").fingerprint() == online.fingerprint()
    assert "the copy in the hub's cache is used: org/name@" in caplog.text
    with pytest.raises(
        TransferError, match=r"no such file or folder, and the hub .* cannot be reached.*--repo-type dataset"
    ):
        open_dataset("org/gone")


def test_private_and_missing_names(hub, monkeypatch):
    hub.publish("org/name", {"x.parquet": parquet("a")})
    hub.private.add("org/name")
    for name in ("org/name", "org/gone"):
        with pytest.raises(
            DataError, match=f"data {name}: there is no such file or folder, and no such repository.*HF_TOKEN"
        ):
            open_dataset(name)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert answers(open_dataset("org/name")) == ["a"]


def chat(*texts):
    return [{"id": t, "image": "images/a.png", "question": "What?", "answer": t} for t in texts]


def lines(*texts):
    return "\n".join(map(json.dumps, chat(*texts))).encode()


def test_json_with_pictures_image_folders_tars_and_saved_tables(hub, tmp_path):
    import tarfile

    hub.publish("org/json", {"train.jsonl": lines("a", "b"), "images/a.png": png(9), "notes.pdf": b"x"})
    dataset = open_dataset("org/json")
    assert answers(dataset) == ["a", "b"]
    assert dataset[0].images[0].load().size == (9, 9)
    assert "notes.pdf" not in fetched(hub)

    hub.publish(
        "org/shards",
        {"data/train-00000-of-00002.jsonl": lines("a", "b"), "data/train-00001-of-00002.jsonl": lines("b", "c")},
    )
    shards = open_dataset("org/shards")
    assert list(shards.sample_ids) == ["a", "b", "b#2", "c"]
    assert answers(shards) == ["a", "b", "b", "c"]

    files = {
        "metadata.jsonl": json.dumps({"file_name": "train/x.png", "text": "A bird."}).encode(),
        "train/x.png": png(7),
    }
    hub.publish("org/birds", files)
    assert [(s.turns[0].answer, s.images[0].load().size) for s in open_dataset("org/birds")] == [("A bird.", (7, 7))]

    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in (("k.png", png(8)), ("k.txt", b"A dog.")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    hub.publish("org/tars", {"train-0.tar": buffer.getvalue()})
    assert [(s.turns[0].answer, s.images[0].load().size) for s in open_dataset("org/tars")] == [("A dog.", (8, 8))]

    datasets.disable_progress_bars()
    datasets.DatasetDict({"train": datasets.Dataset.from_dict({"caption": ["saved"]})}).save_to_disk(
        str(tmp_path / "s")
    )
    hub.publish("org/saved", tmp_path / "s")
    assert answers(open_dataset("org/saved")) == ["saved"]

    with pytest.raises(
        DataError, match=r"kind 'json'; only parquet files are streamed.*DATA=org/json@refs/convert/parquet"
    ):
        open_dataset("org/json:streaming=true")


def test_programs_are_never_run(hub):
    hub.publish("org/name", {"name.py": b"raise SystemExit", "data.parquet": parquet("a")})
    with pytest.raises(
        DataError, match=r"program of its own \(name\.py\), which is not run.*DATA=org/name@refs/convert/parquet"
    ):
        open_dataset("org/name")


def test_archives_and_other_kinds_are_refused(hub):
    hub.publish("org/zip", {"train.zip": b"PK"})
    with pytest.raises(DataError, match=r"\.zip archives"):
        open_dataset("org/zip")
    hub.publish("org/text", {"notes.txt": b"x"})
    with pytest.raises(DataError, match="org/text holds files of the kind 'text', which is not read; expected parquet"):
        open_dataset("org/text")


def test_a_local_folder_comes_before_a_name(hub, tmp_path, monkeypatch):
    hub.publish("org/name", {"x.parquet": parquet("there")})
    (tmp_path / "org" / "name").mkdir(parents=True)
    (tmp_path / "org" / "name" / "x.parquet").write_bytes(parquet("here"))
    monkeypatch.chdir(tmp_path)
    assert answers(open_dataset("org/name")) == ["here"]
    assert not hub.requests
