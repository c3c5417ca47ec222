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


@pytest.mark.parametrize("entries", [("org/name", "org/name@v1"), ("org/name@v1", "org/name")])
def test_two_commits_of_one_repository_are_read_again_each_in_its_entry(hub, tmp_path, entries):
    from vlm_distill_cache.stage2_student.training.preparation import _commits_of

    hub.publish("org/name", {"x.parquet": parquet("old")}, ref="v1")
    hub.publish("org/name", {"x.parquet": parquet("new")})
    (tmp_path / "mixture.yaml").write_text("".join(f"- {entry}\n" for entry in entries))
    built = open_dataset(str(tmp_path / "mixture.yaml"))
    hub.publish("org/name", {"x.parquet": parquet("newer")})
    plan = SimpleNamespace(data={"name": built.name, **built.origin})
    again = open_dataset(str(tmp_path / "mixture.yaml"), commits=_commits_of(SimpleNamespace(plan=plan)))
    assert again.fingerprint() == built.fingerprint()
    assert again.origin == built.origin
    assert answers(again) == [{"org/name": "new", "org/name@v1": "old"}[entry] for entry in entries]


def test_a_cache_tells_the_commits_of_its_data():
    from vlm_distill_cache.stage2_student.training.preparation import _commits_of

    def commits(**data):
        return _commits_of(SimpleNamespace(plan=SimpleNamespace(data=data)))

    one, other = ({"repository": f"org/{name}", "revision": name * 40} for name in "ab")
    expected = {"org/a": "a" * 40, "org/b": "b" * 40}
    assert commits(**one) == {"org/a": "a" * 40}
    assert commits(mixture=[one, {"name": "x.json"}, other]) == [{"org/a": "a" * 40}, {}, {"org/b": "b" * 40}]
    assert commits(parts=[one, other]) == commits(parts=[{"mixture": [one]}, other]) == expected
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


def test_json_with_pictures_image_folders_tars_and_saved_tables(hub, tmp_path, monkeypatch):
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
    monkeypatch.setenv("VLM_DISTILL_CACHE_DIR", str(tmp_path / "near"))
    streamed = open_dataset("org/tars:streaming=true")
    assert [(s.turns[0].answer, s.images[0].load().size) for s in streamed] == [("A dog.", (8, 8))]
    assert streamed.origin == open_dataset("org/tars").origin

    datasets.disable_progress_bars()
    datasets.DatasetDict({"train": datasets.Dataset.from_dict({"question": ["q"], "answer": ["saved"]})}).save_to_disk(
        str(tmp_path / "s")
    )
    hub.publish("org/saved", tmp_path / "s")
    assert answers(open_dataset("org/saved")) == ["saved"]

    with pytest.raises(
        DataError, match=r"kind 'json'; only parquet files and tars are streamed.*DATA=org/json@refs/convert/parquet"
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


PUBLISHED = {
    "README.md": b"---\nlicense: cc-by-4.0\n---\n",
    "llava_instruct_150k.json": json.dumps(chat("a", "b", "c")).encode(),
    "llava_instruct_80k.json": json.dumps(chat("a")).encode(),
    "more/detail_23k.json": json.dumps(chat("b")).encode(),
    "images/a.png": png(9),
}


def test_several_files_that_nothing_joins_are_refused_and_one_can_be_named(hub, tmp_path, monkeypatch):
    commit = hub.publish("org/name", PUBLISHED)
    clone = tmp_path / "clone"
    for path, content in PUBLISHED.items():
        (clone / path).parent.mkdir(parents=True, exist_ok=True)
        (clone / path).write_bytes(content)
    for where in ("org/name", str(clone)):
        message = (
            rf"{where} holds 3 files, and nothing says that they are one data set: llava_instruct_150k\.json, "
            rf"llava_instruct_80k\.json, more/detail_23k\.json; name one, DATA={where}/llava_instruct_150k\.json"
        )
        with pytest.raises(DataError, match=message):
            open_dataset(where)
        assert answers(open_dataset(f"{where}/llava_instruct_150k.json")) == ["a", "b", "c"]
        assert answers(open_dataset(f"{where}/more/*.json")) == ["b"]
        both = open_dataset(f"{where}/llava_instruct_{{80k,150k}}.json")
        assert list(both.sample_ids) == ["a", "a#2", "b", "c"]
        (tmp_path / "mixture.yaml").write_text(f"- data: {where}/llava_instruct_80k.json\n  images: clone\n")
        assert answers(open_dataset(str(tmp_path / "mixture.yaml"))) == ["a"]
    named = open_dataset("org/name@main/llava_instruct_80k.json")
    assert named.name == "org/name/llava_instruct_80k.json"
    assert named.origin == {"repository": "org/name", "revision": commit, "file": "llava_instruct_80k.json"}
    assert named.fingerprint() == open_dataset(f"{clone}/llava_instruct_80k.json").fingerprint()
    with pytest.raises(DataError, match=r"org/name has no file 'llava\.json'; it has llava_instruct_150k\.json, "):
        open_dataset("org/name/llava.json")
    with pytest.raises(DataError, match="is a file of a repository: it has no split; leave out split="):
        open_dataset("org/name/llava_instruct_80k.json:split=test")
    requests = len(hub.requests)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"'clone/more/gone\.json' does not exist"):
        open_dataset("clone/more/gone.json")
    assert len(hub.requests) == requests


@pytest.mark.parametrize(
    "files",
    [
        {"x_train.json": ["a"], "y_train.json": ["b"]},
        {"train/x.jsonl": ["a"], "train/y.jsonl": ["b"]},
        {"part-00.json": ["a"], "part-01.json": ["b"]},
        {
            "README.md": b"---\nconfigs:\n- config_name: c\n  data_files: '*.json'\n---\n",
            "x.json": ["a"],
            "y.json": ["b"],
        },
    ],
)
def test_files_whose_names_or_readme_say_so_are_one_split(hub, files):
    hub.publish("org/name", {path: c if isinstance(c, bytes) else lines(*c) for path, c in files.items()})
    assert answers(open_dataset("org/name")) == ["a", "b"]


def test_a_parquet_file_of_a_repository_is_streamed_too(hub):
    hub.publish("org/name", {"a.parquet": parquet("a", "b"), "b.parquet": parquet("c"), "c.json": lines("x")})
    assert answers(open_dataset("org/name/a.parquet:streaming=true")) == ["a", "b"]
    assert answers(open_dataset("org/name/?.parquet")) == ["a", "b", "c"]
    assert fetched(hub) >= {"a.parquet", "b.parquet"}
    assert "c.json" not in fetched(hub)
    assert answers(open_dataset("org/name/c.json")) == ["x"]


def test_what_is_passed_over_is_said(hub, caplog):
    hub.publish("org/name", {"a.parquet": parquet("a"), "b.parquet": parquet("b"), "extra.jsonl": lines("x")})
    assert answers(open_dataset("org/name")) == ["a", "b"]
    assert "org/name: parquet is read; passed over: extra.jsonl (name a file, DATA=org/name/extra.jsonl)" in caplog.text
    rows = [{"file_name": "a.png", "text": "A."}, {"file_names": ["b.png"], "text": "B."}]
    metadata = "\n".join(map(json.dumps, rows)).encode()
    pictures = {f"train/{name}.png": png(8) for name in "abcd"}
    hub.publish("org/birds", {"train/metadata.jsonl": metadata, **pictures})
    assert answers(open_dataset("org/birds")) == ["A.", "B."]
    assert "org/birds: 2 pictures are left out: no row of the metadata names them, as train/c.png" in caplog.text


def test_a_gap_on_the_hub_is_not_for_the_reader_to_fill(hub):
    hub.publish("org/gap", {f"data/train-0000{i}-of-00003.parquet": parquet("a") for i in (0, 2)})
    for spec in ("org/gap", "org/gap/data/*.parquet"):
        with pytest.raises(
            DataError, match=r"first is data/train-00001-of-00003\.parquet; the repository org/gap itself"
        ):
            open_dataset(spec)
    assert answers(open_dataset("org/gap/data/train-00002-of-00003.parquet")) == ["a"]


def test_pictures_that_are_not_downloaded_are_told_with_what_to_run(hub, tmp_path):
    hub.publish("org/zipped", {"train.jsonl": lines("a", "b"), "images.zip": b"PK"})
    buffer = io.BytesIO()
    pq.write_table(pa.table({"image": ["images/a.png"], "question": ["q"], "answer": ["a"]}), buffer)
    hub.publish("org/named", {"train.parquet": buffer.getvalue(), "images/a.png": png(9)})
    for name, held, file, unpack in (
        ("org/zipped", "images.zip", "train.jsonl", "unpack the archives there, "),
        ("org/named", "images/a.png", "train.parquet", ""),
    ):
        message = (
            rf"{name} names its pictures as files \(images/a.png\), which are not downloaded.*holds {held}: run `hf download "
            rf"{name} --repo-type dataset --local-dir FOLDER`, {unpack}and give DATA=FOLDER/{file} and, as IMAGES="
        )
        with pytest.raises(DataError, match=message):
            open_dataset(name)
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / "images" / "a.png").write_bytes(png(11))
        assert open_dataset(name, images=tmp_path)[0].images[0].load().size == (11, 11)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("https://huggingface.co/datasets/org/name", "is an address; type DATA=org/name$"),
        ("https://huggingface.co/datasets/org/name/tree/v1/", "is an address; type DATA=org/name@v1$"),
        ("https://huggingface.co/datasets/org/name/blob/main/a/b.json", "type DATA=org/name@main/a/b.json$"),
        ("https://huggingface.co/datasets/org/name/resolve/main/b.parquet", "type DATA=org/name@main/b.parquet$"),
        ("hf://datasets/org/name@v1/a.json", "type DATA=org/name@v1/a.json$"),
        ("hf://datasets/org/name", "type DATA=org/name$"),
        ("datasets/org/name", "type DATA=org/name$"),
        ("https://example.org/x.json", "is an address, and nothing is downloaded from there: download it"),
        ("org/name:split=train[:2]", r"a split is read as a whole, \[:2\] is not read.*limit=N"),
        ("org/name:name=x,split=train[:10%]", r"a split is read as a whole, \[:10%\] is not read"),
        ("org/name:split=train+test", r"\+test is not read.*several splits as entries of a mixture"),
    ],
)
def test_addresses_and_slices_are_told_what_to_type(hub, spec, message):
    with pytest.raises(DataError, match=message):
        open_dataset(spec)
    assert not hub.requests
