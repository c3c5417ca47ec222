"""What several test files of this folder start from."""

import shutil

import pytest
from cache_factory import build_cache, make_plan
from servers import serve_s3

from vlm_distill_cache.common.cache.plan import card_store_line
from vlm_distill_cache.common.cache.side_files import CARD
from vlm_distill_cache.common.remotes import streams


@pytest.fixture(scope="module", params=["zarr", "webdataset"])
def whole(request, tmp_path_factory):
    """A sound cache, with a card; tests put back what they change."""
    folder = tmp_path_factory.mktemp("caches") / request.param
    build_cache(folder, make_plan(request.param), fidelity={"kl": 0.25})
    (folder / CARD).write_text(f"# a card\n{card_store_line(make_plan(request.param))}")
    return folder


@pytest.fixture
def copy(whole, tmp_path):
    """The sound cache again, to be changed."""
    shutil.copytree(whole, tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture
def waits(monkeypatch) -> list[float]:
    """Nobody waits before a retry; the seconds that would have been waited."""
    asked: list[float] = []
    monkeypatch.setattr(streams, "wait", asked.append)
    return asked


@pytest.fixture(scope="module")
def s3():
    """The address of an S3 server."""
    with serve_s3() as url:
        yield url
