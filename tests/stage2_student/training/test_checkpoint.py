"""Checkpoints are whole or absent, and bring back every bit of a run's state."""

import json
import logging

import pytest
import torch
from torch import nn

from vlm_distill_cache.common.errors import CacheFormatError, ConfigError
from vlm_distill_cache.common.files.hashing import file_checksum
from vlm_distill_cache.stage2_student.training.checkpoint import (
    CHECKPOINTS,
    STATE,
    TENSORS,
    Position,
    drop_old_checkpoints,
    find_resume_point,
    list_checkpoints,
    read_checkpoint,
    restore_training,
    write_checkpoint,
)
from vlm_distill_cache.stage2_student.training.steps import build_optimizer


def make_run(seed=0):
    torch.manual_seed(seed)
    model = nn.Linear(4, 3)
    optimizer = build_optimizer({"lr": list(model.parameters())}, {"lr": 0.1}, weight_decay=0.0)
    return model, optimizer


def step(model, optimizer):
    loss = model(torch.randn(5, 4)).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def write(output, model, optimizer, total_steps, *, keep=2, fingerprint="run"):
    position = Position(step=total_steps, total_steps=total_steps, samples=8 * total_steps)
    return write_checkpoint(
        output, position, student=model.state_dict(), optimizer=optimizer, fingerprint=fingerprint, keep=keep
    )


def test_a_restored_run_continues_bit_for_bit_random_numbers_included(tmp_path):
    model, optimizer = make_run()
    for _ in range(3):
        step(model, optimizer)
    write(tmp_path, model, optimizer, 3)
    expected = [step(model, optimizer) for _ in range(4)]

    other, other_optimizer = make_run(seed=9)
    checkpoint = find_resume_point(tmp_path, "run")
    assert checkpoint.position == Position(step=3, total_steps=3, samples=24)
    state = read_checkpoint(checkpoint)
    other.load_state_dict(state["student"])
    restore_training(state, other_optimizer)
    assert [step(other, other_optimizer) for _ in range(4)] == expected
    for left, right in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(left, right)


def test_only_the_newest_are_kept(tmp_path):
    model, optimizer = make_run()
    for total in (1, 2, 3, 10):
        write(tmp_path, model, optimizer, total, keep=2)
    assert [checkpoint.position.total_steps for checkpoint in list_checkpoints(tmp_path)] == [3, 10]
    assert sorted(path.name for path in (tmp_path / CHECKPOINTS).iterdir()) == [
        "step-00000003",
        "step-00000010",
    ]


def test_what_a_killed_run_had_begun_to_remove_goes_too(tmp_path):
    model, optimizer = make_run()
    for total in (1, 2, 3, 4):
        write(tmp_path, model, optimizer, total, keep=9)
    for unfinished in ("step-00000001", "step-00000004"):
        (tmp_path / CHECKPOINTS / unfinished / STATE).unlink()
    drop_old_checkpoints(tmp_path, keep=1)
    # What is newer than the last whole one may be what another process is writing.
    assert sorted(path.name for path in (tmp_path / CHECKPOINTS).iterdir()) == [
        "step-00000003",
        "step-00000004",
    ]


def test_a_fresh_run_has_no_resume_point(tmp_path):
    assert find_resume_point(tmp_path, "run") is None


@pytest.mark.parametrize("damage", ["no state", "half a state", "half the tensors", "no tensors"])
def test_a_half_written_checkpoint_is_ignored_and_named(tmp_path, damage, caplog):
    model, optimizer = make_run()
    write(tmp_path, model, optimizer, 1)
    broken = write(tmp_path, model, optimizer, 2)
    if damage == "no state":
        (broken / STATE).unlink()
    elif damage == "half a state":
        (broken / STATE).write_bytes((broken / STATE).read_bytes()[:20])
    elif damage == "no tensors":
        (broken / TENSORS).unlink()
    else:
        (broken / TENSORS).write_bytes((broken / TENSORS).read_bytes()[:100])
    with caplog.at_level(logging.WARNING):
        assert find_resume_point(tmp_path, "run").position.total_steps == 1
    assert "ignoring incomplete checkpoint" in caplog.text
    assert broken.name in caplog.text


def test_the_leftovers_of_a_killed_write_are_not_looked_at_and_removed_by_the_next(tmp_path):
    model, optimizer = make_run()
    write(tmp_path, model, optimizer, 1)
    leftover = tmp_path / CHECKPOINTS / ".tmp-step-00000002-1-abcd"
    leftover.mkdir()
    (leftover / TENSORS).write_bytes(b"half")
    assert find_resume_point(tmp_path, "run").position.total_steps == 1
    write(tmp_path, model, optimizer, 2)
    assert not leftover.exists()


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path):
    model, optimizer = make_run()
    broken = write(tmp_path, model, optimizer, 1)
    (broken / TENSORS).write_bytes(b"short")
    write(tmp_path, model, optimizer, 1)
    assert len(list_checkpoints(tmp_path)) == 1


def test_a_flipped_byte_is_an_error_with_the_remedy(tmp_path):
    model, optimizer = make_run()
    path = write(tmp_path, model, optimizer, 1) / TENSORS
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(CacheFormatError, match=r"checksum is not the one.*delete .*resumes"):
        read_checkpoint(find_resume_point(tmp_path, "run"))


def test_checkpoints_of_another_run_are_refused_with_both_fingerprints(tmp_path):
    model, optimizer = make_run()
    write(tmp_path, model, optimizer, 1, fingerprint="there")
    with pytest.raises(ConfigError, match=r"fingerprint there there, here now.*another --output"):
        find_resume_point(tmp_path, "here")


def test_a_checkpoint_holds_nothing_but_tensors_and_plain_values(tmp_path):
    model, optimizer = make_run()
    folder = write(tmp_path, model, optimizer, 1)
    torch.load(folder / TENSORS, weights_only=True)
    assert json.loads((folder / STATE).read_text())["fingerprint"] == "run"


def test_a_checkpoint_of_an_older_version_is_refused_with_the_remedy(tmp_path):
    model, optimizer = make_run()
    folder = write(tmp_path, model, optimizer, 1)
    torch.save({"model": model.state_dict()}, folder / TENSORS)
    state = json.loads((folder / STATE).read_text())
    state |= {
        "tensor_bytes": (folder / TENSORS).stat().st_size,
        "tensor_checksum": file_checksum(folder / TENSORS),
    }
    (folder / STATE).write_text(json.dumps(state))
    with pytest.raises(CacheFormatError, match=r"older version of this program; delete .*checkpoints to begin again"):
        read_checkpoint(find_resume_point(tmp_path, "run"))
