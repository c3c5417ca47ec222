"""Whatever became of a training's log, it is read: steps that are sound are kept, and what is lost is said."""

import json

import pytest
import torch
from accelerate import Accelerator

from vlm_distill_cache.stage2_student.training.log import LOG, TrainingLog, read_log, summarise

PHASES = [("dpt", 4), ("dft", 6)]
RECORDS = [
    {"step": step, "phase": "dpt" if step < 5 else "dft", "total": 1 / step, "lr": 0.0,
     "step_s": 0.5, "samples_per_s": 8.0, "data_wait": 0.0}
    for step in range(1, 11)
]  # fmt: skip
LINES = [json.dumps(record).encode() + b"\n" for record in RECORDS]


def changed(**values):
    return json.dumps({**RECORDS[6], **values}).encode()


GARBAGE = [
    b"null", b"[1]", b"{}", b"7", b"{", b"\xff\xfe", b"\0" * 4096, b"[" * 100_000, b'{"step":' + b"9" * 5000 + b"}",
    *(changed(step=value) for value in (0, -1, "7", True, 1.0, None)), changed(phase="rlhf"), changed(phase=["dft"]),
    changed(total="x"), changed(total=[1]), changed(step_s=None), changed(total=10**400), changed(phase="dpt"),
    b'{"\\u001b[31m": 1, ' + LINES[6].strip()[1:], LINES[6].replace(b"0.5", b"NaN").strip(), LINES[6].strip()[:-9],
]  # fmt: skip


@pytest.mark.parametrize("line", GARBAGE, ids=range(len(GARBAGE)))
def test_a_line_that_is_no_record_is_left_out_and_said(tmp_path, caplog, line):
    (tmp_path / LOG).write_bytes(b"".join([*LINES[:6], line + b"\n", *LINES[7:]]))
    found = read_log(tmp_path, PHASES)
    assert found == RECORDS[:6] + RECORDS[7:]
    assert "1 lines are damaged and left out, and 1 of 10 steps are missing" in caplog.text
    assert len(caplog.records) == 1
    assert "dft: 5 steps" in summarise(found)


def test_a_log_that_lost_bytes_anywhere_still_gives_sound_steps(tmp_path):
    content = b"".join(LINES)
    for start in range(0, len(content), 37):
        for middle in (b"", b"\0" * 50, b"\n"):
            (tmp_path / LOG).write_bytes(content[:start] + middle + content[start + 50 :])
            found = read_log(tmp_path, PHASES)
            assert len(found) >= 7
            assert all(record in RECORDS for record in found)
            assert summarise(found)


def test_an_unfinished_last_line_is_nothing_to_mention_and_a_lost_log_is(tmp_path, caplog):
    (tmp_path / LOG).write_bytes(b"".join(LINES) + LINES[0][:9])
    assert read_log(tmp_path, PHASES) == RECORDS
    assert not caplog.records
    (tmp_path / LOG).unlink()
    assert read_log(tmp_path, PHASES) == []
    assert "10 of 10 steps are missing" in caplog.text
    assert summarise([]) == ""


def test_steps_that_took_no_time_are_no_division_by_zero():
    assert "dpt: 1 steps" in summarise([{**RECORDS[0], "step_s": 0.0}])


def test_without_curves_the_log_has_the_same_lines(tmp_path):
    for curves in (True, False):
        (tmp_path / str(curves)).mkdir()
        names = ("tensorboard",) if curves else ()
        log = TrainingLog(tmp_path / str(curves), Accelerator(cpu=True), done=[], trackers=names)
        log.add({"total": torch.tensor(0.5)}, step=1, phase="dpt")
        log.flush(durably=True)
        log.close()
        assert (tmp_path / str(curves) / "tensorboard").exists() == curves
    assert (tmp_path / "True" / LOG).read_text() == (tmp_path / "False" / LOG).read_text() != ""
