import pytest

from vlm_distill_cache.stage1_teacher.planning.plan import evaluation_of
from vlm_distill_cache.stage2_student.scores.results import EvaluationReport

TRAINING = {
    "accuracy": {
        "pairs": {"swap_att": {"accuracy": 90.0, "items": 100}, "swap_obj": {"accuracy": 70.0, "items": 100}},
        "questions": {"count": {"accuracy": 100.0, "items": 50}},
        "mean": {"pairs": 80.0, "questions": 100.0},
    }
}


def test_stage_two_reads_the_record_and_kinds_are_averaged():
    scores = EvaluationReport.from_dict(evaluation_of(TRAINING)).scores
    assert scores["likelihood"].value == pytest.approx(0.8)
    assert scores["likelihood"].items == 200
    # The interval of a mean of two independent shares: sqrt(.09/100 + .21/100) / 2 * 1.96
    assert scores["likelihood"].high - 0.8 == pytest.approx(1.96 * (0.003**0.5) / 2, abs=1e-6)
    assert scores["questions/count"].low == scores["questions/count"].high == 1.0


def test_other_checkpoints_have_no_record():
    assert evaluation_of({}) is None
    assert evaluation_of({"accuracy": {}}) is None
