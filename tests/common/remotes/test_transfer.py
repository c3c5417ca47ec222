"""Whole caches go to every kind of place and come back byte for byte, or not at all."""

import errno
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from cache_factory import FIELDS, SIGNALS, build_cache, make_plan, tree
from click.testing import CliRunner
from hub_server import HubServer
from servers import FaultyServer, s3_environment, serve_nginx
from test_remotes import use_hub

import vlm_distill_cache.common.remotes.directory
import vlm_distill_cache.common.remotes.pull
import vlm_distill_cache.common.remotes.push
from vlm_distill_cache.common.cache.documents import document_bytes, parse_document
from vlm_distill_cache.common.cache.manifest import ShardSummary, read_manifest, seal
from vlm_distill_cache.common.cache.side_files import MANIFEST
from vlm_distill_cache.common.cache.sidecar import FileEntry, ShardSidecar
from vlm_distill_cache.common.cli import main
from vlm_distill_cache.common.errors import CacheFormatError, CacheMismatchError, ConfigError, TransferError
from vlm_distill_cache.common.remotes.directory import DirectoryRemote
from vlm_distill_cache.common.remotes.pull import pull
from vlm_distill_cache.common.remotes.push import push
from vlm_distill_cache.common.tools.verify import verify

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # of the hub's library


def make_cache(folder: Path, store: str = "webdataset", *, card: bool = True, **changes: object) -> Path:
    build_cache(folder, make_plan(store, **changes), fidelity={"kl": 0.25})
    if card:
        (folder / "README.md").write_text("# A card\n")
    return folder


@pytest.fixture
def cache(tmp_path):
    return make_cache(tmp_path / "cache")


@pytest.fixture
def place(tmp_path):
    return tmp_path / "place"


@pytest.fixture(params=["directory", "s3", "hub"])
def anywhere(request, tmp_path, monkeypatch):
    """An address to push to, and a function that shows what is there."""
    if request.param == "directory":
        yield str(tmp_path / "there"), lambda: tree(tmp_path / "there")
    elif request.param == "hub":
        with HubServer(tmp_path / "hub") as server:
            use_hub(monkeypatch, server.url)
            yield (
                "hf://datasets/org/name/sub",
                lambda: tree(tmp_path / "hub" / "org" / "name" / "main" / "sub"),
            )
    else:
        url = request.getfixturevalue("s3")
        for name, value in s3_environment(url).items():
            monkeypatch.setenv(name, value)
        from servers import s3_client

        def show() -> dict[str, bytes]:
            client, prefix = s3_client(url), f"{tmp_path.name}/sub/"
            listed = client.list_objects_v2(Bucket="caches", Prefix=prefix).get("Contents", [])
            keys = [entry["Key"] for entry in listed]
            return {
                key.removeprefix(prefix): client.get_object(Bucket="caches", Key=key)["Body"].read() for key in keys
            }

        yield f"s3://caches/{tmp_path.name}/sub", show


def test_a_cache_goes_and_comes_back_and_the_second_time_moves_nothing(cache, anywhere, tmp_path):
    location, show = anywhere
    _, sent = push(cache, location)
    assert show() == tree(cache)
    assert sent.files == len(tree(cache))
    _, again = push(cache, location)
    assert (again.files, again.bytes, again.present) == (0, 0, sent.files)
    manifest, moved = pull(location, tmp_path / "back")
    assert tree(tmp_path / "back") == tree(cache)
    assert verify(tmp_path / "back", deep=True) == []
    assert moved.bytes == sum(map(len, tree(cache).values())) - (cache / MANIFEST).stat().st_size - 9
    _, again = pull(location, tmp_path / "back")
    assert (again.files, again.bytes, again.present) == (0, 0, moved.files)
    assert moved.files == sent.files
    assert manifest == read_manifest(cache)


def test_another_cache_is_replaced_only_when_told_to_and_leaves_nothing_behind(cache, anywhere, tmp_path):
    location, show = anywhere
    push(cache, location)
    before, other = show(), make_cache(tmp_path / "other", shard_size=3, fingerprints={"teacher": "c" * 32})
    (other / "processor" / "note.json").rename(other / "processor" / "more.json")
    seal(other, rewritten=True)
    with pytest.raises(CacheMismatchError, match=f"holds another cache .*{read_manifest(cache).hash}.*--overwrite"):
        push(other, location)
    assert show() == before
    push(other, location, overwrite=True)
    assert show() == tree(other)


@pytest.mark.parametrize("store", ["zarr", "webdataset"])
def test_a_cache_comes_from_a_web_server(tmp_path, store):
    make_cache(tmp_path / "root" / "cache", store)
    with serve_nginx(tmp_path / "root", tmp_path / "nginx") as url:
        pull(f"{url}/cache/", tmp_path / "here")
    assert tree(tmp_path / "here") == tree(tmp_path / "root" / "cache")


def test_progress_ends_at_the_whole_in_both_directions(cache, place, tmp_path):
    for action in (
        lambda f: push(cache, place, on_progress=f),
        lambda f: pull(place, tmp_path / "b", on_progress=f),
    ):
        for _ in range(2):  # the second time nothing moves
            told = []
            action(lambda done, total, told=told: told.append((done, total)))
            done = [d for d, _ in told]
            assert done == sorted(done)
            assert told[-1][0] == told[-1][1]


def test_a_pull_mends_a_finished_copy(cache, tmp_path):
    pull(cache, tmp_path / "back")
    (tmp_path / "back" / "shards" / "00000.tar").write_bytes(b"?" * 10240)
    (tmp_path / "back" / "shards" / "00001.json").unlink()
    (tmp_path / "back" / MANIFEST).write_text("damaged")
    _, moved = pull(cache, tmp_path / "back")
    assert moved.files == 3  # the manifest too
    assert tree(tmp_path / "back") == tree(cache)


def test_a_pull_touches_nothing_that_is_not_a_copy_of_that_cache(cache, tmp_path):
    target, other = tmp_path / "target", make_cache(tmp_path / "other", fingerprints={"teacher": "c" * 32})
    target.mkdir()
    (target / "mine.txt").write_text("mine")
    for content in (target, other, tmp_path / "mine" / "file"):
        content.parent.mkdir(exist_ok=True)
        if not content.exists():
            content.write_text("x")
        before = tree(content) if content.is_dir() else content.read_text()
        with pytest.raises(CacheMismatchError, match=str(content)):
            pull(cache, content)
        assert before == (tree(content) if content.is_dir() else content.read_text())
    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / ".tmp-manifest.json-pull").write_bytes((other / MANIFEST).read_bytes())
    with pytest.raises(CacheMismatchError, match=f"{read_manifest(other).hash}.*{read_manifest(cache).hash}"):
        pull(cache, begun)
    for inside in (cache / "inside", tmp_path, cache):
        with pytest.raises(ConfigError, match=r"lie inside each other|lies in .*, a cache"):
            pull(cache, inside)
        with pytest.raises(ConfigError, match=r"lie inside each other|lies in .*, a cache"):
            push(cache, inside, overwrite=True)
    assert verify(cache) == []


@pytest.mark.parametrize("name", ["../escaped", "/tmp/escaped", "a/../../escaped", "a\\b", "C:/x"])
def test_a_hostile_manifest_cannot_write_outside(cache, tmp_path, name):
    body = parse_document((cache / MANIFEST).read_bytes(), "")
    body["files"][name] = body["files"].pop("processor/note.json")
    (cache / MANIFEST).write_bytes(document_bytes(body))
    with pytest.raises(CacheFormatError, match="could leave the cache folder and is refused"):
        pull(cache, tmp_path / "deep" / "back")
    assert not (tmp_path / "deep").exists()


@pytest.mark.parametrize("name", ["manifest.json", "README.md", "shards/00000.tar", "processor/.tmp-x", "shards"])
def test_a_hostile_manifest_cannot_claim_names_of_ours(cache, tmp_path, name):
    body = parse_document((cache / MANIFEST).read_bytes(), "")
    body["files"][name] = body["files"]["processor/note.json"]
    (cache / MANIFEST).write_bytes(document_bytes(body))
    with pytest.raises(CacheFormatError, match=f"{name}.* refused"):
        pull(cache, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def reseal_sidecar(cache: Path, change) -> None:
    """Rewrite the sidecar of shard 0 and the manifest's line of it, as somebody who forges a cache would."""
    path = cache / "shards" / "00000.json"
    body = parse_document(path.read_bytes(), "")
    change(body)
    path.write_bytes(document_bytes(body))
    manifest = read_manifest(cache)
    forged = ShardSummary.of(ShardSidecar.from_dict(body, ""))
    forged = replace(manifest, shards=(forged, *manifest.shards[1:]))
    (cache / MANIFEST).write_bytes(document_bytes(forged.to_dict()))


@pytest.mark.parametrize("extra", [["shards/00000.json"], [f"shards/00000.{i}" for i in range(10_000)]])
def test_a_hostile_sidecar_cannot_replace_itself_or_flood_a_folder(cache, tmp_path, extra):
    empty = FileEntry.of_bytes(b"").to_dict()
    reseal_sidecar(cache, lambda body: body["files"].update(dict.fromkeys(extra, empty)))
    with pytest.raises(CacheFormatError, match=r"00000\.json: lists itself, or \d+ files, above 10000"):
        pull(cache, tmp_path / "back")
    assert not list((tmp_path / "back").rglob("*.tar"))


def test_descriptions_that_do_not_fit_each_other_are_refused_before_shards_are_fetched(cache, tmp_path):
    manifest = read_manifest(cache)
    lying = replace(manifest.shards[0], bytes=1)
    for changed in (
        replace(manifest, shards=(lying, *manifest.shards[1:])),
        replace(manifest, plan_hash="d" * 32),
        replace(manifest, shards=manifest.shards[:2]),
    ):
        (cache / MANIFEST).write_bytes(document_bytes(changed.to_dict()))
        target = tmp_path / f"back-{changed.hash}"
        with pytest.raises(CacheFormatError, match=r"run `cachectl verify` on|lists 2 shards; expected 3"):
            pull(cache, target)
        assert not list(target.rglob("*.tar"))
        assert not (target / MANIFEST).exists()


def test_too_little_room_is_said_before_anything_is_fetched(cache, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 0, 20_000))
    with pytest.raises(TransferError, match=r"needs [\d,]+ bytes more, but there are 20,000 free; make room"):
        pull(cache, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_a_disk_that_fills_up_keeps_what_is_verified(cache, tmp_path, monkeypatch):
    class Filling(DirectoryRemote):
        full = True

        def download(self, name, target, *, size, on_bytes=None):
            if self.full and name.endswith("00001.tar"):
                super().download(name, target, size=size, on_bytes=on_bytes)
                raise OSError(errno.ENOSPC, "No space left on device")
            super().download(name, target, size=size, on_bytes=on_bytes)

    remote = Filling(cache)
    monkeypatch.setattr(vlm_distill_cache.common.remotes.pull, "open_remote", lambda _: remote)
    with pytest.raises(TransferError, match=r"00001\.tar: No space left on device; make room, then run the same"):
        pull(cache, tmp_path / "back", jobs=1)
    assert (tmp_path / "back" / "shards" / "00000.tar").exists()
    remote.full = False
    _, moved = pull(cache, tmp_path / "back", jobs=1)
    assert moved.files == 4  # a shard, its side, the card and the manifest
    assert tree(tmp_path / "back") == tree(cache)


def test_two_pulls_into_one_folder_share_the_work(cache, tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    with FaultyServer(tmp_path) as server, ThreadPoolExecutor(2) as pool:
        for _ in pool.map(lambda _: pull(f"{server.url}/cache", tmp_path / "back"), range(2)):
            pass
    assert tree(tmp_path / "back") == tree(cache)
    tars = [size for path, size in server.sent.items() if path.endswith(".tar")]
    assert sum(tars) == sum(len(data) for name, data in tree(cache).items() if name.endswith(".tar"))


def test_a_place_without_a_cache_is_said_to_have_none(tmp_path):
    with pytest.raises(CacheFormatError, match=r"no teacher cache \(no manifest.json\); there is no such folder"):
        pull(tmp_path / "nothing", tmp_path / "back")
    assert not (tmp_path / "back").exists()


def run(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result.output


def test_the_commands_say_what_they_did_and_what_comes_next(cache, place, tmp_path):
    shown = run("push", cache, place, "--jobs", 2)
    assert f"Pushed {cache} to {place}: {len(tree(cache))} files copied" in shown
    assert f"cachectl pull {place}" in shown
    assert "nothing to copy" in run("push", cache, place)
    shown = run("pull", place, tmp_path / "back")
    assert f"Pulled {place} to {tmp_path / 'back'}" in shown
    assert f"make distill STUDENT=mobilevlm DATA=FILE IMAGES=FOLDER CACHE={tmp_path / 'back'}" in shown
    assert "nothing to copy" in run("pull", place, tmp_path / "back")
    assert "--overwrite" in run("push", make_cache(tmp_path / "other", "zarr"), place, code=1)
    assert "unknown kind of address" in run("pull", "gopher://x", tmp_path / "x", code=1)
    run("pull", place, code=2)
    run("push", cache, place, "--jobs", 0, code=2)


def test_a_plan_of_a_single_signal_travels_too(tmp_path, place):
    fields = {"logits": FIELDS["logits"]}
    cache = make_cache(tmp_path / "small", fields=fields, signals={"logits": SIGNALS["logits"]}, card=False)
    push(cache, place)
    assert tree(place) == tree(cache)
