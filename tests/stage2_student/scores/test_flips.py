"""Items on which two students differ."""

from types import SimpleNamespace

import PIL.Image

from vlm_distill_cache.data.sample import EvaluationSet, Frame, Question
from vlm_distill_cache.stage2_student.scores import flips


class Clip:
    name = "clip"

    def frames(self, sampling):
        return [Frame(image=PIL.Image.new("RGB", (8, 8), "red"), time=1.0)][: sampling.most]


def test_a_question_about_a_video_is_shown_by_a_frame(monkeypatch):
    monkeypatch.setattr(flips, "load_token_text", lambda cache: None)
    monkeypatch.setattr(flips, "_ask", lambda models, item: ({}, {}))
    monkeypatch.setattr(flips, "teachers_words", lambda *given: "right")
    monkeypatch.setattr(flips, "outcomes", lambda after, before: {"won": [("other", 0)], "lost": []})
    monkeypatch.setattr(flips, "choose", lambda places: places)
    items = EvaluationSet(
        questions=(Question(item_id="a-0", kind="other", image=Clip(), question="What?", answer="Red"),)
    )
    reports = tuple(SimpleNamespace(items={"questions": {"other": [mark]}}) for mark in (0, 1))
    (found,) = flips.collect_flips({}, reports, items, None, SimpleNamespace(items={}))
    assert [(flip.item_id, flip.teacher, flip.picture.getpixel((0, 0))) for flip in found.shown] == [
        ("a-0", "right", (255, 0, 0))
    ]
