"""A transfer that is killed with SIGKILL goes on where it was, and does not move twice what had arrived."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cache_factory import build_cache, make_plan, tree
from servers import Fault, FaultyServer, s3_environment, serve_s3

from vlm_distill_cache.common.errors import CacheFormatError
from vlm_distill_cache.common.remotes import lease
from vlm_distill_cache.common.remotes.pull import pull
from vlm_distill_cache.common.remotes.push import push
from vlm_distill_cache.common.tools.verify import verify

ROOT = Path(__file__).resolve().parents[3]


def kill_when(arguments: list[str], reached, **environment: str) -> None:
    """Run cachectl in a process of its own until ``reached()``, and then kill it without warning."""
    process = subprocess.Popen(
        [sys.executable, "-m", "vlm_distill_cache.common.cli", *arguments], cwd=ROOT, env={**os.environ, **environment},
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    with process:
        for _ in range(3000):
            if reached():
                break
            assert process.poll() is None, process.stderr.read().decode()
            time.sleep(0.01)
        else:
            pytest.fail("the transfer did not get there")
        process.kill()
        process.wait()
    assert process.returncode == -signal.SIGKILL


@pytest.fixture
def cache(tmp_path):
    build_cache(tmp_path / "cache", make_plan("webdataset"))
    (tmp_path / "cache" / "README.md").write_text("# A card\n")
    return tmp_path / "cache"


@pytest.mark.parametrize(
    ("name", "held"),
    [("manifest.json", 0), ("plan.json", 100), ("shards/00001.json", 0), ("shards/00001.tar", 4_000)],
)
def test_a_killed_pull_goes_on_and_fetches_only_the_rest(cache, tmp_path, name, held):
    target, path = tmp_path / "here", f"/cache/{name}"
    arriving = (target / name).with_name(f".tmp-{Path(name).name}-fetch")

    def reached() -> bool:
        asked = any(path == request for _, request, _ in server.requests)
        return asked and (held == 0 or (arriving.exists() and arriving.stat().st_size == held))

    with FaultyServer(tmp_path) as server:
        server.concerns = lambda _, request: request == path
        server.always = Fault(stall=held)
        kill_when(["pull", f"{server.url}/cache", str(target), "--jobs", "1"], reached)
        assert not (target / "manifest.json").exists()
        server.always = Fault()
        pull(f"{server.url}/cache", target)
    assert tree(target) == tree(cache)
    assert verify(target) == []
    sent = {request.removeprefix("/cache/"): size for request, size in server.sent.items()}
    sent.pop("manifest.json")  # read anew by each
    assert sent == {name: len(data) for name, data in tree(cache).items() if name != "manifest.json"}


def check_every_kill(tmp_path: Path, stride: int) -> None:
    script = Path(__file__).parents[1] / "kill_transfers.py"
    result = subprocess.run(
        [sys.executable, script, tmp_path, str(stride)],
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{script.parent}"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert all(int(places) * stride > 50 for places in result.stdout.split())


def test_killed_at_a_file_operation_and_called_again_every_transfer_ends_with_the_same_bytes(tmp_path):
    check_every_kill(tmp_path, stride=7)


@pytest.mark.slow
def test_killed_at_any_file_operation_and_called_again_every_transfer_ends_with_the_same_bytes(tmp_path):
    check_every_kill(tmp_path, stride=1)


@pytest.fixture(scope="module")
def s3():
    with serve_s3() as url:
        yield url


@pytest.mark.parametrize("name", ["plan.json", "shards/00001.tar", "shards/00001.json", "manifest.json"])
@pytest.mark.slow
def test_a_killed_push_leaves_no_cache_and_the_next_one_completes_it(cache, tmp_path, s3, monkeypatch, name):
    location = f"s3://caches/{tmp_path.name}"
    with FaultyServer(upstream=s3) as server:
        server.concerns = lambda method, path: method == "PUT" and name in path
        server.always = Fault(hang=True)
        environment = s3_environment(server.url)
        kill_when(
            ["push", str(cache), location, "--jobs", "1"],
            lambda: any(method == "PUT" and name in path for method, path, _ in server.requests),
            **environment,
        )
        server.always = Fault()
        monkeypatch.setattr(lease, "_STALE", 0.2)
        for variable, value in environment.items():
            monkeypatch.setenv(variable, value)
        with pytest.raises(CacheFormatError, match=r"no teacher cache|not complete"):
            pull(location, tmp_path / "early")
        there = [path for method, path, _ in server.requests if method == "PUT" and name not in path]
        server.requests.clear()
        push(cache, location)
        again = [path for method, path, _ in server.requests if method == "PUT"]
        pull(location, tmp_path / "here")
    assert tree(tmp_path / "here") == tree(cache)
    shards = {path.partition(".")[0] for path in there if "/shards/" in path and ".json" in path}
    assert not shards & {path.partition(".")[0] for path in again}  # finished shards are not sent again
    assert len(shards) == {"plan.json": 0, "manifest.json": 3}.get(name, 1)
