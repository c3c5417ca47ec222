"""Pushes to one place at the same time: whoever reports success left a cache there that is whole."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from cache_factory import build_cache, make_plan, tree
from servers import Fault, FaultyServer, s3_client, s3_environment

from vlm_distill_cache.common.errors import CacheFormatError, CacheMismatchError, DistillError
from vlm_distill_cache.common.remotes import lease, open_remote, push
from vlm_distill_cache.common.remotes.directory import DirectoryRemote
from vlm_distill_cache.common.remotes.pull import pull


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    """Three caches: of two plans, and two of the same plan with different files beside the shards."""
    made = []
    for number, teacher in enumerate(("a", "b", "b")):
        folder = tmp_path_factory.mktemp("caches") / str(number)
        build_cache(folder, make_plan("webdataset", fingerprints={"teacher": teacher * 32}), fidelity={"kl": number})
        made.append(folder)
    return made


@pytest.fixture
def proxy(s3, monkeypatch):
    with FaultyServer(upstream=s3) as server:
        server.concerns = lambda method, path: True
        for variable, value in s3_environment(server.url).items():
            monkeypatch.setenv(variable, value)
        for name, seconds in {"_RENEWED": 0.02, "_STALE": 0.6, "_SETTLED": 0.3}.items():
            monkeypatch.setattr(lease, name, seconds)
        yield server


@pytest.mark.parametrize("kind", ["folder", "s3", "s3 without conditions"])
@pytest.mark.slow(quick=1)
def test_of_several_pushes_at_once_the_place_holds_one_whole_and_the_others_say_so(kind, caches, proxy, tmp_path):
    proxy.always = Fault(unconditional=kind.endswith("conditions"))
    place = tmp_path / "place" if kind == "folder" else f"s3://caches/{kind}".replace(" ", "-")

    def attempt(cache) -> bool:
        try:
            push.push(cache, place, jobs=2, overwrite=True)
        except DistillError as error:
            assert "writing there" in str(error) or "another" in str(error)  # noqa: PT017
            return False
        return True

    for turn in range(2):
        with ThreadPoolExecutor(3) as pool:
            won = list(pool.map(attempt, caches))
        assert any(won)
        pull(place, tmp_path / f"back-{turn}")
        assert tree(tmp_path / f"back-{turn}") in [tree(cache) for cache, did in zip(caches, won, strict=True) if did]


def test_a_push_that_was_killed_keeps_the_next_one_waiting_and_a_living_one_keeps_it_off(caches, proxy, s3):
    place = "s3://caches/held"
    key = {"Bucket": "caches", "Key": f"held/{lease.LEASE}"}
    with open_remote(place).hold(), pytest.raises(CacheMismatchError, match="another push is writing there; wait"):
        push.push(caches[0], place)
    s3_client(s3).put_object(Body=b"left by a push that was killed", **key)
    push.push(caches[0], place)
    with open_remote(place).hold() as check:
        check()
        s3_client(s3).put_object(Body=b"of another", **key)
        with pytest.raises(CacheMismatchError, match="another push has taken over"):
            check()
    assert s3_client(s3).get_object(**key)["Body"].read() == b"of another"


def test_a_manifest_that_names_what_is_not_there_is_taken_back(caches, tmp_path, monkeypatch):
    place = DirectoryRemote(tmp_path / "place")
    upload = place.upload

    def lose(files, **options) -> None:
        if "manifest.json" in files:
            (place.root / "shards" / "00001.tar").write_bytes(b"of another")
        upload(files, **options)

    monkeypatch.setattr(place, "upload", lose)
    monkeypatch.setattr(push, "open_remote", lambda _: place)
    with pytest.raises(CacheMismatchError, match=r"changed by another push meanwhile \(shards/00001\.tar\)"):
        push.push(caches[0], place.root)
    with pytest.raises(CacheFormatError, match="not complete"):
        pull(place.root, tmp_path / "back")
