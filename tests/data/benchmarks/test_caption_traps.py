"""Files that nearly say something else: what they say is read, or refused in words; never the next best thing."""

from pathlib import Path

import captions_files as files
import pytest
from captions_files import seen

from vlm_distill_cache.common.errors import SampleError
from vlm_distill_cache.data.benchmarks.pictures import Pictures


def test_a_bare_number_is_a_picture_of_its_own_benchmark(tmp_path: Path):
    """Another benchmark's 139.jpg is another picture; shared ones, and those of --images, may lie elsewhere."""
    annotations = tmp_path / "all" / "up" / "data"
    annotations.mkdir(parents=True)
    files.put(tmp_path / "all" / "other" / "images" / "139.jpg", 1)
    files.put(tmp_path / "outside" / "139.jpg", 2)

    def found(*images: Path) -> int:
        return seen(Pictures([tmp_path / "all", *images]).find("139.jpg", near=annotations))

    with pytest.raises(SampleError, match=r"own folder .*other/images/139\.jpg.*--images"):
        found()
    assert found(tmp_path / "outside") == 2
    assert found(tmp_path / "all" / "other") == 1
    files.put(tmp_path / "all" / "visual_genome" / "VG_100K" / "139.jpg", 3)
    assert found() == 3
    files.put(tmp_path / "all" / "up" / "any" / "139.jpg", 4)
    assert found() == 4

    files.write_json(
        tmp_path / "all" / "other" / "rows.json", []
    )  # a benchmark of its own, below annotations at the top
    pictures = Pictures([tmp_path / "all"])
    (tmp_path / "all" / "visual_genome" / "VG_100K" / "139.jpg").unlink()
    (tmp_path / "all" / "up" / "any" / "139.jpg").unlink()
    with pytest.raises(SampleError, match="own folder"):
        pictures.find("139.jpg", near=tmp_path / "all")
