import re
from pathlib import Path

import numpy as np
import PIL.Image
import torch

from vlm_distill_cache.common.attention.boxes import tile_boxes
from vlm_distill_cache.common.attention.tiles import Tile, grid_tile
from vlm_distill_cache.stage2_student.scores.metrics import Score
from vlm_distill_cache.stage2_student.scores.overlays import Overlay, draw_heat
from vlm_distill_cache.stage2_student.scores.report import render_report
from vlm_distill_cache.stage2_student.scores.results import EvaluationReport

RECORDS = [{"step": i, "phase": "dft", "lm": 2.0 / i, "total": 3.0 / i, "lr": 1e-3} for i in range(1, 300)]


def page(tmp_path: Path, **arguments) -> str:
    render_report(tmp_path / "report.html", **{
        "title": "run", "facts": {}, "curves": {}, "evaluations": {}, "overlays": ()} | arguments)  # fmt: skip
    return (tmp_path / "report.html").read_text()


def test_the_page_is_self_contained(tmp_path: Path):
    picture = PIL.Image.new("RGB", (40, 40))
    overlay = Overlay("s1", "what color ?", "red", picture, picture, picture)
    text = page(tmp_path, curves={"sft": RECORDS}, overlays=[overlay])
    assert "http" not in text
    assert "<script" not in text
    assert text.count("data:image/png;base64,") == 3


def test_every_loss_term_gets_a_chart_with_a_line_per_run(tmp_path: Path):
    text = page(tmp_path, curves={"sft": RECORDS, "distilled": RECORDS})
    assert text.count("<svg") == 2  # lm and total; the learning rate is no loss
    assert text.count("<polyline") == 4
    assert len(set(re.findall(r'stroke="(#\w+)"', text))) == 2


def test_scores_stand_side_by_side_and_missing_ones_are_dashes(tmp_path: Path):
    score = Score(value=0.5, low=0.4, high=0.6, items=10)
    reports = {
        "SFT": EvaluationReport(scores={"likelihood": score, "likelihood/swap_att": score}),
        "distilled": EvaluationReport(scores={"likelihood": score}),
    }
    text = page(tmp_path, evaluations=reports)
    assert "50.0 <small>[40.0, 60.0]</small>" in text
    assert re.search(r"swap_att</td><td>50\.0 .*?</td><td>-</td>", text)


def test_the_page_leads_with_the_three_lines_and_the_gain(tmp_path: Path):
    half, more = (Score(value=value, low=value - 0.1, high=value + 0.1, items=10) for value in (0.5, 0.7))
    names = ("likelihood", "questions", "teacher/top1")
    reports = {
        "sft": EvaluationReport(scores=dict.fromkeys((*names, "questions/color"), half)),
        "distilled": EvaluationReport(scores=dict.fromkeys((*names, "questions/color"), more)),
    }
    rows = re.findall(r"<tr>(.*?)</tr>", page(tmp_path, evaluations=reports, compared=("sft", "distilled")))
    assert "<th>gain</th>" in rows[0]
    assert [re.search(r"<td>(\w+)", row)[1] for row in rows[1:4]] == ["captions", "questions", "top"]
    assert all("<td>+20.0 <small>[+" in row for row in rows[1:4])
    assert len({row.count("<td>") for row in rows[1:]}) == 1


def test_hostile_names_are_escaped_and_broken_values_left_out(tmp_path: Path):
    records = [*RECORDS, {"step": 300, "lm": float("nan"), "total": None}]
    text = page(tmp_path, title="<img src=x>", facts={"data": "<b>"}, curves={"<i>": records})
    assert "<img src=x>" not in text
    assert "<b>" not in text
    assert "nan" not in text


def test_heat_is_brightest_where_the_mass_is():
    picture = PIL.Image.new("RGB", (60, 60), (120, 120, 120))
    mass = torch.tensor([0.0, 0.0, 0.1, 0.6])
    heat = np.asarray(draw_heat(picture, mass, tile_boxes((grid_tile(2, 2),)))).astype(int)
    redness = heat[..., 0] - heat[..., 2]
    assert redness[40:, 40:].mean() > redness[40:, :20].mean() > redness[:20, :20].mean() - 1


def test_heat_outside_the_picture_is_cut_off():
    picture = PIL.Image.new("RGB", (60, 30), (120, 120, 120))
    padded = Tile(2, 2, (0.0, -0.5, 1.0, 1.5))
    heat = np.asarray(draw_heat(picture, torch.tensor([0.0, 1.0, 0.0, 0.0]), tile_boxes((padded,)))).astype(int)
    redness = heat[..., 0] - heat[..., 2]
    assert redness[:13, 35:].mean() > redness[17:, :25].mean()


def test_what_the_scores_do_not_tell_stands_beside_them(tmp_path: Path):
    assert "on the training data &lt;itself&gt;" in page(tmp_path, notes=["on the training data <itself>"])
