"""A data set asked by sample ids: its questions and pictures, and nothing for what it has not or cannot read."""

import json

import PIL.Image
import pytest

from vlm_distill_cache.common.errors import DataError
from vlm_distill_cache.data.questions import open_asked


def test_it_tells_what_it_has_and_leaves_the_rest_out(tmp_path):
    def entry(name, image=None):
        said = [("human", "<image>what is it" if image else "what"), ("gpt", "a"), ("human", "and that?"), ("gpt", "b")]
        turns = [{"from": role, "value": text} for role, text in said]
        return {"id": name, "conversations": turns} | ({"image": image} if image else {})

    PIL.Image.new("RGB", (4, 3)).save(tmp_path / "seen.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    entries = [
        entry("seen", "seen.png"),
        entry("text"),
        entry("broken", "broken.png"),
        {"id": "odd", "conversations": 3},
    ]
    (tmp_path / "data.json").write_text(json.dumps(entries))
    asked = open_asked(str(tmp_path / "data.json"), split="train", images=None)
    turns = ["what is it", "and that?"]
    assert asked.questions(["broken", "nobody", "odd", "seen", "text"]) == {
        "broken": turns, "seen": turns, "text": ["what", "and that?"],
    }  # fmt: skip
    assert [picture.size for picture in asked.pictures("seen")] == [(4, 3)]
    assert [asked.pictures(name) for name in ("text", "broken", "odd", "nobody")] == [None] * 4
    with pytest.raises(DataError, match="nothing-there"):
        open_asked("nothing-there", split="train", images=None)
