"""Checkpoints are whole or absent, and bring back every bit of a run's state."""

import errno
import io
import json
import logging
import os
import shutil
from dataclasses import replace

import pytest
import torch
from torch import nn

from vlm_distill_cache.common.errors import ConfigError
from vlm_distill_cache.common.files.signed import list_files, read_signed, write_signed
from vlm_distill_cache.stage2_student.training.checkpoint import (
    CHECKPOINTS,
    STATE,
    TENSORS,
    Position,
    drop_old_checkpoints,
    find_resume_point,
    list_checkpoints,
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
    position = Position()
    for _ in range(total_steps):
        position = position.advance(8)
    if not optimizer.state:
        step(model, optimizer)
    for averages in optimizer.state.values():
        averages["step"].fill_(total_steps)
    student = {"values": model.state_dict(), "merged": [], "frozen": "hash"}
    return write_checkpoint(output, position, student=student, optimizer=optimizer, fingerprint=fingerprint, keep=keep)


def resume_point(output, fingerprint="run"):
    return find_resume_point(output, fingerprint, [(10, 8)])


def test_a_restored_run_continues_bit_for_bit_random_numbers_included(tmp_path):
    model, optimizer = make_run()
    for _ in range(3):
        step(model, optimizer)
    write(tmp_path, model, optimizer, 3)
    expected = [step(model, optimizer) for _ in range(4)]

    other, other_optimizer = make_run(seed=9)
    checkpoint, state = resume_point(tmp_path)
    assert checkpoint.position == Position(step=3, total_steps=3, samples=24, total_samples=24)
    other.load_state_dict(state["student"]["values"])
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
    assert resume_point(tmp_path) is None


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
        assert resume_point(tmp_path)[0].position.total_steps == 1
    assert "ignoring incomplete checkpoint" in caplog.text
    assert broken.name in caplog.text


def test_the_leftovers_of_a_killed_write_are_not_looked_at_and_removed_by_the_next(tmp_path):
    model, optimizer = make_run()
    write(tmp_path, model, optimizer, 1)
    leftover = tmp_path / CHECKPOINTS / ".tmp-step-00000002-1-abcd"
    leftover.mkdir()
    (leftover / TENSORS).write_bytes(b"half")
    assert resume_point(tmp_path)[0].position.total_steps == 1
    write(tmp_path, model, optimizer, 2)
    assert not leftover.exists()


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path):
    model, optimizer = make_run()
    broken = write(tmp_path, model, optimizer, 1)
    (broken / TENSORS).write_bytes(b"short")
    write(tmp_path, model, optimizer, 1)
    assert len(list_checkpoints(tmp_path)) == 1


def test_no_bit_of_a_checkpoint_can_be_wrong_and_be_believed(tmp_path, caplog):
    model, optimizer = make_run()
    write(tmp_path, model, optimizer, 1)
    folder = write(tmp_path, model, optimizer, 2)
    sound = resume_point(tmp_path)[0]
    ignored = 0
    for name, bits in ((STATE, 23), (TENSORS, 1999)):
        whole = (folder / name).read_bytes()
        for bit in range(0, 8 * len(whole), bits):
            content = bytearray(whole)
            content[bit // 8] ^= 1 << bit % 8
            (folder / name).write_bytes(content)
            found = resume_point(tmp_path)[0]  # white space may differ
            assert found == sound or found.position.total_steps == 1, (name, bit)
            ignored += found != sound
        (folder / name).write_bytes(whole)
    assert ignored > 100
    assert caplog.text.count("ignoring ") == ignored


def test_a_position_that_somebody_signed_must_be_one_of_the_run_of_the_folder_and_of_the_tensors(tmp_path):
    model, optimizer = make_run()
    write(tmp_path, model, optimizer, 1)
    folder = write(tmp_path, model, optimizer, 2)
    state = read_signed(folder / STATE)
    values = (-1, 0, 1, 2, 3, 16, 24, 10**30, 1.0, 2.0, True, None, "2", [2])
    lies = [
        {key: value} for key in state["position"] for value in values if repr(value) != repr(state["position"][key])
    ]
    lies += [{"entries_read": 5}, {"step": 3, "samples": 24, "total_steps": 3, "total_samples": 24}, {"more": 1}]
    for lie in lies:
        write_signed(folder / STATE, {**state, "position": {**state["position"], **lie}})
        assert resume_point(tmp_path)[0].position.total_steps == 1, lie
    for position in ([], None, 7, {}):
        write_signed(folder / STATE, {**state, "position": position})
        assert resume_point(tmp_path)[0].position.total_steps == 1
    (folder / STATE).write_text(json.dumps(state))  # without any checksum
    assert resume_point(tmp_path)[0].position.total_steps == 1
    write_signed(folder / STATE, state)
    folder.rename(folder.with_name("step-00000003"))
    assert resume_point(tmp_path)[0].position.total_steps == 1


def sign(folder, tensors):
    """Write tensors, and the state that vouches for them."""
    torch.save(tensors, folder / TENSORS)
    state = read_signed(folder / STATE)
    write_signed(folder / STATE, {**state, "files": list_files(folder, [TENSORS])})


def test_tensors_that_somebody_signed_are_used_only_if_they_are_what_a_training_writes(tmp_path, caplog):
    model, optimizer = make_run()
    write(tmp_path, model, optimizer, 1)
    folder = write(tmp_path, model, optimizer, 2)
    whole = torch.load(folder / TENSORS, weights_only=True)
    odd = (None, 7, "x", [], [1], {}, {"x": 1}, torch.ones(3), (1, 2))
    places = [(name,) for name in whole if name != "fingerprint"]
    places += [("student", name) for name in whole["student"]] + [("optimizer", name) for name in whole["optimizer"]]
    places += [("random", name) for name in ("torch", "numpy", "python")] + [("optimizer", "state", 0)]
    lies = [*odd]
    for *path, last in places:
        for value in (*odd, ...):
            lie = {name: dict(part) if isinstance(part, dict) else part for name, part in whole.items()}
            inner = lie
            for name in path:
                inner[name] = dict(inner[name])
                inner = inner[name]
            if value is ...:
                del inner[last]
            else:
                inner[last] = value
            # Which values and parameters there must be only the student knows, and says so when it loads them.
            known = (("values", {}), ("frozen", "x"), ("merged", []), (0, ...))
            if not any(last == name and type(value) is type(other) and value == other for name, other in known):
                lies.append(lie)
    lies.append({**whole, "random": {**whole["random"], "numpy": (*whole["random"]["numpy"][:2], 10**6, 0, 0.0)}})
    for lie in lies:
        sign(folder, lie)
        assert resume_point(tmp_path)[0].position.total_steps == 1, lie
    later = {"step": 3, "samples": 24, "total_steps": 3, "total_samples": 24}
    sign(folder, {**whole, "position": {**whole["position"], **later}})
    write_signed(folder / STATE, {**read_signed(folder / STATE), "position": {**whole["position"], **later}})
    folder.rename(folder.with_name("step-00000003"))
    assert resume_point(tmp_path)[0].position.total_steps == 1
    assert "the optimizer has taken 2 steps, not 3" in caplog.text


def test_averages_of_other_parameters_are_refused_and_settings_are_the_runs(tmp_path):
    model, optimizer = make_run()
    write(tmp_path, model, optimizer, 2)
    _, state = resume_point(tmp_path)
    groups = [{**group, "betas": (0.0, 0.0), "eps": "much"} for group in state["optimizer"]["param_groups"]]
    restore_training({**state, "optimizer": {**state["optimizer"], "param_groups": groups}}, optimizer)
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.999)
    other = nn.Linear(5, 3)
    optimizer = build_optimizer({"lr": list(other.parameters())}, {"lr": 0.1}, weight_decay=0.0)
    with pytest.raises(ConfigError, match=r"Delete its folder in checkpoints to go on from the one before"):
        restore_training(state, optimizer)


@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO])
def test_what_cannot_be_read_at_the_moment_stops_the_run_and_stays(tmp_path, monkeypatch, code):
    model, optimizer = make_run()
    write(tmp_path, model, optimizer, 1)
    folder = write(tmp_path, model, optimizer, 2)
    for hidden in (tmp_path / CHECKPOINTS, folder / STATE, folder / TENSORS):
        with monkeypatch.context() as patch:
            for module, name, real in ((io, "open", io.open), (os, "listdir", os.listdir)):

                def refuse(path, *more, real=real, hidden=hidden, **options):
                    if str(path) == str(hidden):
                        raise OSError(code, os.strerror(code), str(path))
                    return real(path, *more, **options)

                patch.setattr(module, name, refuse)
            with pytest.raises(ConfigError, match=rf"{os.strerror(code)}; nothing was changed. Make it readable"):
                resume_point(tmp_path)
    assert resume_point(tmp_path)[0].position.total_steps == 2


def test_what_has_another_name_is_not_looked_at_and_stays_and_links_and_files_are_only_unlinked(tmp_path):
    model, optimizer = make_run()
    folder = write(tmp_path, model, optimizer, 2, keep=1)
    names = ("step-00000001.best", "step-00000001-notes", "step-1", "notes", "step-0000000a", "step-99999999.tmp")
    for name in names:
        shutil.copytree(folder, folder.with_name(name))
    shutil.copytree(folder, tmp_path / "elsewhere")
    folder.with_name("step-00000001").write_text("a file")
    folder.with_name("step-00000009").symlink_to(tmp_path / "elsewhere")
    assert resume_point(tmp_path)[0].path == folder
    write(tmp_path, model, optimizer, 3, keep=1)
    assert {path.name for path in folder.parent.iterdir()} == {*names, "step-00000003"}
    assert {path.name for path in (tmp_path / "elsewhere").iterdir()} == {STATE, TENSORS}


def test_a_run_has_the_positions_that_its_steps_lead_to_and_no_others():
    phases = [(2, 4), (0, 3), (3, 5)]
    position, steps = Position(), []
    for index, (count, size) in enumerate(phases):
        for _ in range(count):
            position = position.advance(size)
            steps.append(position)
        position = replace(position, phase=index + 1, step=0, samples=0)
    found = [
        Position(phase=phase, step=step, samples=samples, total_steps=total, total_samples=total_samples)
        for phase in range(4)
        for step in range(5)
        for samples in range(17)
        for total in range(7)
        for total_samples in range(25)
    ]
    assert [place for place in found if place.is_of(phases)] == steps


def test_if_no_checkpoint_is_sound_the_training_begins_again_and_says_so(tmp_path, caplog):
    model, optimizer = make_run()
    for total in (1, 2):
        (write(tmp_path, model, optimizer, total) / TENSORS).write_bytes(b"")
    assert resume_point(tmp_path) is None
    assert "the training begins again" in caplog.text


def test_the_one_before_a_damaged_checkpoint_stays_until_a_later_one_is_written(tmp_path):
    model, optimizer = make_run()
    for total in (1, 3):
        folder = write(tmp_path, model, optimizer, total, keep=2)
    content = bytearray((folder / TENSORS).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / TENSORS).write_bytes(content)
    drop_old_checkpoints(tmp_path, keep=1, newest=resume_point(tmp_path)[0])
    assert resume_point(tmp_path)[0].position.total_steps == 1
    write(tmp_path, model, optimizer, 2, keep=1)
    assert [path.name for path in (tmp_path / CHECKPOINTS).iterdir()] == ["step-00000002"]


def test_checkpoints_of_another_run_are_refused_with_both_fingerprints(tmp_path):
    model, optimizer = make_run()
    write(tmp_path, model, optimizer, 1, fingerprint="there")
    with pytest.raises(ConfigError, match=r"fingerprint there there, here now.*another --output"):
        resume_point(tmp_path, "here")


def test_a_checkpoint_holds_nothing_but_tensors_and_plain_values(tmp_path):
    model, optimizer = make_run()
    folder = write(tmp_path, model, optimizer, 1)
    torch.load(folder / TENSORS, weights_only=True)
    assert json.loads((folder / STATE).read_text())["fingerprint"] == "run"


def test_a_checkpoint_of_an_older_version_is_refused_with_the_remedy(tmp_path):
    model, optimizer = make_run()
    folder = write(tmp_path, model, optimizer, 1)
    state = read_signed(folder / STATE)
    size, checksum = state.pop("files")[TENSORS]
    (folder / STATE).write_text(json.dumps({**state, "tensor_bytes": size, "tensor_checksum": checksum}))
    with pytest.raises(ConfigError, match=r"older version of this program.* delete .*checkpoints to begin again"):
        resume_point(tmp_path)
