"""What a build wrote itself is noted as sound: whoever trains from it here need not look through it again."""

import pytest

from vlm_distill_cache.common.cache.manifest import seal
from vlm_distill_cache.common.cache.sidecar import sidecar_path
from vlm_distill_cache.common.tools import trust
from vlm_distill_cache.common.tools.trust import open_trusted


@pytest.mark.slow
def test_only_shards_that_a_build_wrote_itself_are_trusted_unseen(build_cache, tmp_path, monkeypatch):
    monkeypatch.setenv("VLM_DISTILL_VERIFIED_DIR", str(tmp_path / "notes"))
    monkeypatch.setattr(trust, "_noted", set())
    looked_at = []
    real = trust.verify_shard
    monkeypatch.setattr(trust, "verify_shard", lambda *args, **rest: looked_at.append(args[1]) or real(*args, **rest))
    build_cache(tmp_path / "cache", limit=6, shard_size=2)
    open_trusted(tmp_path / "cache")
    assert looked_at == []
    # Shards that lay there before the build came, or that only `seal` saw, are anybody's.
    for note in (tmp_path / "notes").iterdir():
        note.unlink()
    trust._noted.clear()
    sidecar_path(tmp_path / "cache", 1).unlink()
    (tmp_path / "cache" / "manifest.json").unlink()
    build_cache(tmp_path / "cache", limit=6, shard_size=2)
    seal(tmp_path / "cache")
    open_trusted(tmp_path / "cache")
    assert looked_at == [0, 2]
