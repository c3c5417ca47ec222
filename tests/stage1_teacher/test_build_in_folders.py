"""A cache of many shards (here: more than two), which lie in folders: built, resumed, begun anew, topped up."""

import pytest
from click.testing import CliRunner

from vlm_distill_cache.common.cache import layout
from vlm_distill_cache.common.opening import open_cache
from vlm_distill_cache.common.tools.verify import verify
from vlm_distill_cache.stage1_teacher.cli import main
from vlm_distill_cache.stage1_teacher.config import BuildConfig
from vlm_distill_cache.stage1_teacher.extend import extend


def tree(root):
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def shard_files(files):
    """Of files by path those of the shards, by their last names; and all others but those that say where shards lie."""
    shards = {name.rpartition("/")[2]: data for name, data in files.items() if name.endswith(".tar")}
    documents = ("manifest.json", "README.md", "recipe.yaml", "config.yaml")
    beside = {name: data for name, data in files.items() if not name.startswith("shards/") and name not in documents}
    return shards, beside


@pytest.mark.slow
def test_a_build_in_folders_makes_the_records_of_a_flat_one_killed_begun_anew_or_extended(
    build_cache, tiny_llava, tmp_path, monkeypatch
):
    options = {"limit": 6, "shard_size": 2, "store": "webdataset", "signals": ("logits",)}
    build_cache(tmp_path / "flat", **options)
    build_cache(tmp_path / "extended", **options | {"limit": 4})
    flat = tree(tmp_path / "flat")
    monkeypatch.setattr(layout, "FLAT_SHARDS", 2)
    monkeypatch.setattr(layout, "FOLDER_SHARDS", 2)
    cache = tmp_path / "cache"
    built = build_cache(cache, **options)
    whole = tree(cache)
    assert {name for name in whole if name.startswith("shards/")} == {
        f"shards/{index // 2:02d}/{index:05d}.{suffix}" for index in range(3) for suffix in ("tar", "json")
    }
    assert shard_files(whole) == shard_files(flat)
    assert verify(cache, deep=True) == []
    assert f"{cache}: sealed, 3 shards" in CliRunner().invoke(main, ["status", str(cache)]).output
    # Killed between a shard and its sidecar, and while another was written.
    for name in ("shards/00/00001.json", "shards/01/00002.json", "shards/01/00002.tar", "manifest.json", "README.md"):
        (cache / name).unlink()
    (cache / "shards/01/.tmp-00002.tar-1-a").touch()
    assert "1 of 3 shards done" in CliRunner().invoke(main, ["status", str(cache)]).output
    assert build_cache(cache, **options).built == 2
    assert tree(cache) == whole
    # A flat cache of so many shards is begun anew where that is asked for, and refused where not.
    result = CliRunner().invoke(main, ["seal", str(tmp_path / "flat")])
    assert "build it anew (the same command and --overwrite)" in result.output
    build_cache(tmp_path / "flat", overwrite=True, **options)
    assert shard_files(tree(tmp_path / "flat")) == shard_files(whole)
    assert "shards/00000.json" not in tree(tmp_path / "flat")
    # Two shards lie side by side; the third one brings all of them into folders.
    given = {"limit": 6, "teacher": str(tiny_llava), "data": "shapes"}
    extend(BuildConfig(cache=str(tmp_path / "extended"), **given), given=given)
    opened, expected = open_cache(tmp_path / "extended"), open_cache(cache)
    assert verify(tmp_path / "extended") == []
    assert list(opened.sample_ids) == list(expected.sample_ids)
    for name in expected.sample_ids:
        ours, theirs = opened.read(name), expected.read(name)
        assert {field: array.tobytes() for field, array in ours.items()} == {
            field: array.tobytes() for field, array in theirs.items()
        }
    assert built.built == 3
