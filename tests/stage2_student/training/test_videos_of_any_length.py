"""A student whose model stacks videos is trained on videos of different lengths: samples are passed one by one."""

import json
from pathlib import Path

from PIL import Image
from tiny_families import save_tiny
from train_student import train_student

from vlm_distill_cache.stage1_teacher.config import BuildConfig
from vlm_distill_cache.stage1_teacher.extract import extract

SQUASHED = {"size": {"height": 24, "width": 24}, "do_resize": True, "do_rescale": True, "do_normalize": True,
            "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 3}  # fmt: skip


def test_videos_of_different_lengths_are_one_step(tmp_path: Path):
    entries = []
    for name, count in (("short", 2), ("long", 3)):
        (tmp_path / name).mkdir()
        for number in range(count):
            Image.new("RGB", (30, 30), (60 * number, 90, 10)).save(tmp_path / name / f"{number}.png")
        turns = [{"from": "human", "value": "<video>\nwhat color is it ?"}, {"from": "gpt", "value": "red"}]
        entries.append({"id": name, "video": name, "conversations": turns})
    data = tmp_path / "data.json"
    data.write_text(json.dumps(entries))
    cache = tmp_path / "cache"
    student = save_tiny("llava_onevision", tmp_path / "student")
    (student / "video_preprocessor_config.json").write_text(json.dumps(SQUASHED))
    extract(BuildConfig(cache=str(cache), data=str(data), teacher=str(student), fidelity_samples=0, batch_size=2))
    losses = {"lm": 1.0, "answer_attention": 1.0}
    result = train_student(
        student=str(student), data=str(data), cache=str(cache), output=str(tmp_path / "run"), phases=["dft"],
        dft={"steps": 1, "batch_size": 2, "losses": losses},
    )  # fmt: skip
    assert [phase.config.micro_batch_size for phase in result.preparation.phases] == [1]
