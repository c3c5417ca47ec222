"""What a run believes: its own students, signed documents of the right form, and nobody's modes, names or files."""

import errno
import functools
import io
import itertools
import json
import os
import shutil
from pathlib import Path
from unittest import mock

import pytest
from click.testing import CliRunner
from finished_runs import make_config, whole

from vlm_distill_cache.common.errors import ConfigError, DistillError, ModelError
from vlm_distill_cache.common.files.signed import list_files, write_signed
from vlm_distill_cache.stage2_student import final_folder
from vlm_distill_cache.stage2_student import run as run_module
from vlm_distill_cache.stage2_student.cli import main
from vlm_distill_cache.stage2_student.final_folder import read_final
from vlm_distill_cache.stage2_student.run import load_run_config, run, write_report_again
from vlm_distill_cache.stage2_student.trained_student import open_student
from vlm_distill_cache.stage2_student.training.resolve import open_caches
from vlm_distill_cache.stage2_student.training.stamp import read_stamp


def test_a_student_that_cannot_be_read_at_the_moment_is_neither_damaged_nor_made_again(finished, tmp_path):
    output = tmp_path / "run"
    shutil.copytree(finished.output, output)
    before = whole(output)
    weights, real = output / "distilled" / "final" / "model.safetensors", io.open

    def refuse(path, *more, **options):
        if str(path) == str(weights):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return real(path, *more, **options)

    with mock.patch("io.open", refuse), pytest.raises(ConfigError, match=r"nothing was changed. Make it readable"):
        read_final(weights.parent)
    assert whole(output) == before


def test_a_callers_accelerator_changes_nothing_and_its_modes_of_torch_are_refused(tiny_cache, finished, tmp_path):
    import torch
    from accelerate import Accelerator
    from accelerate.state import GradientState

    arm = run_module.arms(make_config(tiny_cache[0], tmp_path))[run_module.BASELINE]
    accelerator = Accelerator(gradient_accumulation_steps=4, cpu=True)
    GradientState()._set_sync_gradients(False)
    trained = run_module.train_alone(arm)
    assert read_final(trained.final)["files"] == read_final(finished.output / "sft" / "final")["files"]
    accelerator.free_memory()
    modes = [torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), torch.device("meta")]
    for mode in modes:
        with mode, pytest.raises(ConfigError, match=r"switched on torch\..*; call train\(\) outside of it"):
            run_module.train_alone(arm)
    torch.set_default_dtype(torch.float64)
    try:
        with pytest.raises(ConfigError, match=r"set_default_dtype\(torch.float64\)"):
            run_module.train_alone(arm)
    finally:
        torch.set_default_dtype(torch.float32)


def test_another_student_is_neither_trained_over_nor_shown(tiny_cache, copied):
    before = whole(copied)
    shutil.rmtree(copied / "distilled" / "checkpoints")
    other = run_module.arms(make_config(tiny_cache[0], copied, "seed=5"))[run_module.DISTILLED]
    with pytest.raises(ConfigError, match=r"belongs to another run: fingerprint .*another --output"):
        run_module.train_alone(other)
    assert whole(copied) == before
    stamp = (copied / "run.json").read_bytes()
    (copied / "distilled" / "final").rename(copied / "mine")
    shutil.copytree(copied / "sft" / "final", copied / "distilled" / "final")
    for left in (read_stamp(copied)["left"], {}):  # of a finished run, and of one that says nothing
        write_signed(copied / "run.json", {**read_stamp(copied), "left": left})
        with pytest.raises(ConfigError, match=r"no page can be written: .*run the same `distill run` command again"):
            write_report_again(copied)
    shutil.rmtree(copied / "distilled" / "final")
    (copied / "mine").rename(copied / "distilled" / "final")
    (copied / "run.json").write_bytes(stamp)
    write_report_again(copied)
    assert not run(make_config(tiny_cache[0], copied)).fresh


def test_scores_are_made_again_when_what_they_were_measured_on_has_changed(tiny_cache, tmp_path):
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "this"}]
    held = tmp_path / "held.json"
    config = make_config(tiny_cache[0], tmp_path / "run", f"evaluation.data={held}")
    cache = next(iter(open_caches(config).values()))
    held.write_text(json.dumps([{"id": "a", "conversations": turns}]))
    first = run_module.describe_scoring(config, cache, {config.cache: cache.manifest_hash})
    assert first == run_module.describe_scoring(config, cache, {config.cache: cache.manifest_hash})
    assert run_module.describe_scoring(config, cache, {})["cache"] == cache.manifest_hash  # in no phase
    held.write_text(json.dumps([{"id": "b", "conversations": turns}]))
    assert first != run_module.describe_scoring(config, cache, {config.cache: cache.manifest_hash})
    # Nothing new for what runs have said so far, whatever is scored while they train.
    plain = make_config(tiny_cache[0], tmp_path / "run", "evaluation.every=3", "evaluation.best=questions")
    assert run_module.describe_scoring(plain, cache, {plain.cache: ""}) == {
        "data": None, "images": None, "split": "test", "limit": 2, "letters": False, "agreement_samples": 4, "overlays": 1,
    }  # fmt: skip


ODD = (None, 3, "x", [], [{}], {}, {"x": 1}, -(10**30))


def leaves(value, path=()):
    for name, item in value.items():
        yield (*path, name)
        if isinstance(item, dict):
            yield from leaves(item, (*path, name))


@pytest.mark.slow
def test_whatever_signed_documents_of_a_run_say_is_refused_in_words_or_harmless(copied):
    def report():
        write_report_again(copied)

    def open_final():
        open_student(copied / "distilled" / "final")

    final, run_json = copied / "distilled" / "final" / "distillation.json", copied / "run.json"
    refused = 0
    for path, tried in ((final, open_final), (run_json, report), (copied / "evaluation.json", report)):
        sound = path.read_bytes()
        body = {name: item for name, item in json.loads(sound).items() if name != "checksum"}
        places = [place for place in leaves(body) if place[0] not in ("files", "left", "run")]
        places = [place for place in places if path == run_json or place[0] != "config"]
        places = [place for place in places if path == final or len(place) < 4]
        for number, (place, value) in enumerate(itertools.product([*places, ("files",)], [*ODD, ...])):
            if number % (17 if path == final else 97):
                continue
            lie = json.loads(json.dumps(body))
            inner = functools.reduce(lambda inner, name: inner[name], place[:-1], lie)
            inner.pop(place[-1], None)
            if value is not ...:
                inner[place[-1]] = value
            write_signed(path, lie)
            if path.parent == copied and path != run_json:  # the stamp vouches for it, too
                stamp = json.loads(run_json.read_bytes())
                del stamp["checksum"]
                write_signed(run_json, {**stamp, "left": {**stamp["left"], **list_files(copied, [path.name])}})
            try:
                tried()
            except DistillError:
                refused += 1
        path.write_bytes(sound)
    assert refused > 15


def test_a_student_without_its_digests_or_with_files_more_is_refused_and_nothing_is_removed(copied):
    final = copied / "distilled" / "final"
    body = json.loads((final / "distillation.json").read_text())
    old = {name: item for name, item in body.items() if name not in ("checksum", "files", "origin")}
    for lie in (old, {**old, "files": {}}, {**old, "files": {"config.json": body["files"]["config.json"]}}):
        write_signed(final / "distillation.json", lie)
        with pytest.raises(ModelError, match=r"distillation.json"):
            read_final(final)
    (final / "distillation.json").write_text(json.dumps(old))  # as the first version wrote it
    with mock.patch.object(final_folder, "_log") as log:
        assert read_final(final) == old
    assert "train it again, with another --output, for a student that is checked" in log.warning.call_args[0][0]
    (final / "distillation.json").write_text(json.dumps(body))
    names = (
        "special_tokens_map.json",
        "processor_config.json",
        "added_tokens.json",
        "chat_template.jinja",
        "x.safetensors",
    )
    for name in (
        *names,
        "generation_config2.json",
        "adapter_config.json",
        "additional_chat_templates/x.jinja",
        "modeling_x.py",
    ):
        if name in body["files"]:
            continue
        (final / name).parent.mkdir(exist_ok=True)
        (final / name).write_text("{}")
        with pytest.raises(ModelError, match=rf"{name}: none of the files .*move it away"):
            read_final(final)
        (final / name).unlink()
    read_final(final)


@pytest.mark.slow
def test_what_lies_in_the_place_of_a_runs_files_is_named_and_makes_nobody_wait(tiny_cache, copied):
    os.mkfifo(copied / "pipe")
    (copied / "sft" / "log.jsonl").unlink()
    (copied / "pipe").rename(copied / "sft" / "log.jsonl")
    write_report_again(copied)  # without the curve
    final = copied / "distilled" / "final"
    shutil.rmtree(final)
    for command in (["evaluate", str(final)], ["export", str(final), "--output", str(copied / "x")]):
        told = CliRunner().invoke(main, command)
        assert (told.exit_code, "run the command that trained it again" in told.output) == (1, True), told.output
    final.symlink_to(final)
    assert run(make_config(tiny_cache[0], copied)).fresh
    assert not final.is_symlink()
    (copied / "run.json").unlink()
    shutil.rmtree(copied / "sft" / "checkpoints")
    (copied / "sft" / "checkpoints").write_text("")
    shutil.rmtree(copied / "sft" / "final")
    for name, kind in (("checkpoints", "folder"), ("log.jsonl", "file")):
        with pytest.raises(ConfigError, match=rf"{name}: expected a {kind}; move away what is there"):
            run(make_config(tiny_cache[0], copied))
        (copied / "sft" / name).unlink()


def test_a_configuration_file_is_bounded_and_says_nothing_that_only_yaml_has(tiny_cache, tmp_path):
    with pytest.raises(ConfigError, match="more than 4000000 bytes"):
        load_run_config(Path("/dev/zero"), ["output=o"], cache=tiny_cache[0])
    for text in ("seed: 2020-01-01", "dft: {steps: !!binary aGk=}", "phases: !!set {dft}", "dft: {lr: [2020-01-01]}"):
        (tmp_path / "mine.yaml").write_text(text)
        with pytest.raises(ConfigError, match=r"; put texts in quotes"):
            load_run_config(tmp_path / "mine.yaml", ["output=o"], cache=tiny_cache[0])
    with pytest.raises(ConfigError, match=r": evaluation is 3"):
        make_config(tiny_cache[0], tmp_path, "evaluation=3")
