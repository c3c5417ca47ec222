"""A checkpoint whose files are links, as in a snapshot folder of the Hugging Face cache, is the checkpoint itself."""

from pathlib import Path

import torch
from published_factory import mobilevlm_tensors, write_mobilevlm

from vlm_distill_cache.common.models.published import load_published
from vlm_distill_cache.stage1_teacher.teacher.teacher import Teacher


def link(folder: Path, target: Path) -> Path:
    """A folder of links into another one that holds the bytes under other names."""
    blobs = target.with_name(f"{target.name}-blobs")
    blobs.mkdir()
    target.mkdir()
    for number, path in enumerate(sorted(path for path in folder.rglob("*") if path.is_file())):
        blob = blobs / f"{number:040x}"
        blob.write_bytes(path.read_bytes())
        place = target / path.relative_to(folder)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(blob)
    return target


def test_a_library_checkpoint_behind_links_loads_with_the_same_fingerprints(tiny_llava, tmp_path: Path):
    linked = Teacher(link(tiny_llava, tmp_path / "snapshot"))
    plain = Teacher(tiny_llava)
    assert linked.fingerprints() == plain.fingerprints()
    for left, right in zip(linked.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(left, right)


def test_a_published_checkpoint_behind_links_loads_too(tmp_path: Path):
    write_mobilevlm(tmp_path / "published", mobilevlm_tensors())
    plain = load_published(tmp_path / "published", dtype=torch.float32)
    linked = load_published(link(tmp_path / "published", tmp_path / "snapshot"), dtype=torch.float32)
    for left, right in zip(linked.parameters(), plain.parameters(), strict=True):
        assert torch.equal(left, right)
