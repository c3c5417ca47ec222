"""Students and their parts by name on the hub: what a run is then, what it writes down, and what it notices later."""

import json
from dataclasses import replace

import pytest
from click.testing import CliRunner
from hub_server import ModelHub, use_models
from safetensors.torch import load_file, save_file
from tiny_cache import DATA

from vlm_distill_cache.common.config import config_to_dict
from vlm_distill_cache.common.errors import ConfigError, ModelError
from vlm_distill_cache.stage2_student.cli import main
from vlm_distill_cache.stage2_student.config import MODELS, describe, public_config
from vlm_distill_cache.stage2_student.run import load_run_config, run, train_alone
from vlm_distill_cache.stage2_student.students.presets import student_folder
from vlm_distill_cache.stage2_student.training.resolve import with_folders

NAME = "tiny-org/tiny-llava"
FAST = [
    "dpt.steps=1", "dft.steps=1", "sft.steps=1", "dpt.batch_size=2", "dft.batch_size=2", "sft.batch_size=2",
    "evaluation.limit=2", "evaluation.letters=false", "evaluation.agreement_samples=0", "evaluation.overlays=0", "device=cpu",
]  # fmt: skip


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with ModelHub(tmp_path) as server:
        use_models(monkeypatch, server.url, tmp_path / "home")
        yield server


@pytest.fixture
def offline(monkeypatch):
    return lambda: monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def configure(tiny_cache, output, *more):
    return load_run_config(None, [f"data='{DATA}'", f"output={output}", *FAST, *more], cache=tiny_cache[0])


def with_other_weights(model, target):
    files = {path.name: path.read_bytes() for path in model.iterdir()}
    tensors = {name: tensor * 1.01 for name, tensor in load_file(model / "model.safetensors").items()}
    save_file(tensors, target, {"format": "pt"})
    return files | {"model.safetensors": target.read_bytes()}


@pytest.mark.parametrize("option", ["student", "student_weights", "vision_tower", "language_model"])
def test_a_run_is_the_same_however_its_models_are_named(hub, offline, tiny_llava, tiny_cache, tmp_path, option):
    commit = hub.publish(NAME, tiny_llava)
    repository = tmp_path / "home" / f"models--{NAME.replace('/', '--')}"
    found = [configure(tiny_cache, "o", f"{option}={NAME}")]
    hub.requests.clear()
    offline()
    ways = (NAME, f"{NAME}@{commit}", repository, repository / "snapshots" / commit)
    found += [configure(tiny_cache, "o", f"{option}='{way}'") for way in ways]
    for config in found:
        assert getattr(config, option) == str(repository / "snapshots" / commit)
        assert describe(config, {})[option] == f"{NAME}@{commit}"
        assert getattr(public_config(config), option) == f"{NAME}@{commit}"
        assert with_folders(config) == config
    assert hub.requests == []


def test_folders_and_short_names_are_written_down_as_they_were_given(hub, tiny_llava, tiny_cache):
    config = configure(tiny_cache, "o", f"student='{tiny_llava}/'", f"vision_tower='{tiny_llava}'")
    assert (config.student, config.vision_tower) == (f"{tiny_llava}/", str(tiny_llava))
    for student in ("mobilevlm", "mobilevlm-v1-tiny", "smolvlm", f"{tiny_llava}/"):
        plain = replace(config, student=student)
        assert with_folders(plain) == plain
        described = describe(plain, {})
        assert {name: described[name] for name in MODELS} == {name: config_to_dict(plain)[name] for name in MODELS}
    assert hub.requests == []


def test_a_students_name_decides_its_phases_as_its_folder_does(hub, tiny_llava, tiny_cache):
    hub.publish(NAME, tiny_llava)
    named, given = (configure(tiny_cache, "o", f"student='{student}'") for student in (NAME, tiny_llava))
    assert config_to_dict(named)["dft"] == config_to_dict(given)["dft"]
    assert named.dft.trainable == "all"  # of the preset for demonstrations, which a narrow student gets


@pytest.mark.slow
def test_a_run_by_name_goes_on_offline_and_notices_a_moved_main(
    hub, offline, tiny_llava, tiny_cache, tmp_path, monkeypatch
):
    old = hub.publish(NAME, tiny_llava)
    options = (tiny_cache, tmp_path / "run", f"student={NAME}")
    summary = run(configure(*options))
    assert summary.fresh
    final = json.loads((tmp_path / "run" / "distilled" / "final" / "distillation.json").read_text())
    assert final["config"]["student"] == f"{NAME}@{old}"
    assert f"{NAME}@{old}: distilled" in summary.report.read_text()
    assert not run(configure(*options)).fresh
    new = hub.publish(NAME, with_other_weights(tiny_llava, tmp_path / "other"))
    with pytest.raises(ConfigError, match=f"(?s)student.*{NAME}@{old}.*{NAME}@{new}"):
        run(configure(*options))
    assert not run(configure(tiny_cache, tmp_path / "run", f"student={NAME}@{old}")).fresh
    monkeypatch.undo()
    use_models(monkeypatch, "http://127.0.0.1:9", tmp_path / "home")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert not run(configure(tiny_cache, tmp_path / "run", f"student={NAME}@{old}")).fresh


def test_a_tower_by_name_is_the_students(hub, tiny_llava, tiny_cache, tmp_path):
    commit = hub.publish(NAME, tiny_llava)
    config = configure(
        tiny_cache, tmp_path / "run", "student=mobilevlm-tiny", f"vision_tower={NAME}", "phases=[sft]", "projector=mlp"
    )
    trained = train_alone(config)
    described = json.loads((trained.final / "distillation.json").read_text())
    assert described["config"]["vision_tower"] == f"{NAME}@{commit}"
    assert str(tmp_path / "home") not in json.dumps(described)


def test_a_trained_student_is_scored_and_exported_by_its_name(hub, tiny_cache, tmp_path):
    trained = train_alone(configure(tiny_cache, tmp_path / "run", "student=mobilevlm-tiny", "phases=[sft]"))
    hub.publish("me/mine", trained.final)
    scored = CliRunner().invoke(main, ["evaluate", "me/mine", "--cache", str(tiny_cache[0]), "--limit", "2"])
    assert scored.exit_code == 0, scored.output
    assert "mine" in scored.output.splitlines()[0]
    exported = CliRunner().invoke(main, ["export", "me/mine", "--output", str(tmp_path / "half")])
    assert exported.exit_code == 0, exported.output
    for words in (
        ["evaluate", "me/none"],
        ["export", "me/none", "--output", "x"],
        ["import", "me/none", "--output", "x"],
    ):
        refused = CliRunner().invoke(main, words)
        assert refused.exit_code == 1
        assert "me/none: there is no such folder, and no such repository on the hub" in refused.output
    again = configure(tiny_cache, tmp_path / "again", "student=me/mine", "phases=[sft]")
    assert train_alone(again).final.is_dir()


def test_a_mistyped_short_name_is_no_name_on_the_hub(hub):
    with pytest.raises(ConfigError, match=r"'mobilevml' is neither a known student .*org/name"):
        student_folder("mobilevml", None)
    assert hub.requests == []


def test_a_mistyped_folder_of_a_part_is_refused_at_once(hub, tiny_cache):
    with pytest.raises(
        ModelError, match=r"vision_tower ./clip: there is no such folder, and a name on the hub is org/name"
    ):
        configure(tiny_cache, "o", "vision_tower=./clip")
