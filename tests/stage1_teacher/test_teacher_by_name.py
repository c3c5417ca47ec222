"""A teacher by its name on the hub: which cache it gives, how it is shown, and what a second run finds."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import ModelHub, use_models
from safetensors.torch import load_file, save_file

from vlm_distill_cache.common.cache.plan import read_plan
from vlm_distill_cache.common.errors import CacheMismatchError, ConfigError, ModelError
from vlm_distill_cache.common.tools.inspect import describe_cache
from vlm_distill_cache.stage1_teacher.config import BuildConfig
from vlm_distill_cache.stage1_teacher.extract import extract_with_processes
from vlm_distill_cache.stage1_teacher.planning.plan import teacher_directory

NAME = "tiny-org/tiny-llava"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with ModelHub(tmp_path) as server:
        use_models(monkeypatch, server.url, tmp_path / "home")
        yield server


def contents(cache: Path) -> dict[str, bytes]:
    return {str(path.relative_to(cache)): path.read_bytes() for path in sorted(cache.rglob("*")) if path.is_file()}


def with_other_weights(model: Path, target: Path) -> Path:
    shutil.copytree(model, target)
    tensors = load_file(target / "model.safetensors")
    save_file({name: tensor * 1.01 for name, tensor in tensors.items()}, target / "model.safetensors", {"format": "pt"})
    return target


@pytest.mark.slow
def test_a_cache_is_the_same_whichever_way_its_teacher_was_named(
    hub: ModelHub, tiny_llava, build_cache, tmp_path, caplog
):
    commit = hub.publish(NAME, tiny_llava)
    by_folder, by_name = tmp_path / "by-folder", tmp_path / "by-name"
    build_cache(by_folder, limit=4)
    build_cache(by_name, limit=4, teacher=NAME)
    plans = read_plan(by_folder), read_plan(by_name)
    assert plans[0].fingerprints == plans[1].fingerprints
    assert "revision" not in plans[0].teacher
    assert (plans[1].teacher["name"], plans[1].teacher["revision"]) == (NAME, commit)
    first, second = contents(by_folder), contents(by_name)
    told = {"plan.json", "manifest.json", "README.md"}
    assert {name: data for name, data in first.items() if name not in told} == {
        name: data for name, data in second.items() if name not in told
    }
    assert f"{NAME} (revision `{commit}`, family" in (by_name / "README.md").read_text()
    assert f"{NAME}, revision {commit}, family llava" in describe_cache(by_name)
    # Begun by one way, finished by the other; what is there already is not fetched again.
    hub.requests.clear()
    for cache, teacher in ((by_folder, NAME), (by_name, str(tiny_llava))):
        lost = next((cache / "shards").glob("*00000.json"))
        (cache / "manifest.json").unlink()
        lost.unlink()
        caplog.clear()
        assert build_cache(cache, limit=4, teacher=teacher).built == 1
        assert "not recorded" not in caplog.text
    asked = {path for _, path, _ in hub.requests}
    assert {path for path in asked if NAME in path} == {f"/api/models/{NAME}", f"/api/models/{NAME}/revision/main"}
    assert not [
        path for path in asked if NAME not in path and "agent" not in path
    ]  # nor anything else by the libraries
    assert contents(by_folder).keys() == first.keys()
    assert contents(by_folder)["plan.json"] == first["plan.json"]


@pytest.mark.slow
def test_a_folder_of_the_hubs_cache_is_shown_by_its_name(hub: ModelHub, tiny_llava, build_cache, tmp_path, monkeypatch):
    commit = hub.publish(NAME, tiny_llava)
    build_cache(tmp_path / "first", limit=2, teacher=NAME)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hub.requests.clear()
    repository = tmp_path / "home" / f"models--{NAME.replace('/', '--')}"
    (tmp_path / "link").symlink_to(repository / "snapshots" / commit)
    for number, place in enumerate((NAME, repository, repository / "snapshots" / commit, tmp_path / "link")):
        build_cache(tmp_path / f"{number}", limit=2, teacher=str(place))
        assert read_plan(tmp_path / f"{number}") == read_plan(tmp_path / "first")
    assert hub.requests == []


def test_a_moved_main_is_noticed_and_its_old_revision_goes_on(hub: ModelHub, tiny_llava, build_cache, tmp_path):
    old = hub.publish(NAME, tiny_llava)
    cache = tmp_path / "cache"
    build_cache(cache, limit=4, teacher=NAME)
    hub.publish(NAME, with_other_weights(tiny_llava, tmp_path / "other"))
    with pytest.raises(
        CacheMismatchError, match=rf"(?s)fingerprints.*TEACHER={NAME}@{old} \(--teacher\) goes on"
    ) as error:
        build_cache(cache, limit=4, teacher=NAME)
    assert "revision:" not in str(error.value)
    assert build_cache(cache, limit=4, teacher=f"{NAME}@{old}").built == 0
    (cache / "manifest.json").unlink()
    with pytest.raises(ConfigError, match=f"TEACHER={NAME}@{old} "):
        teacher_directory(teacher="", data="mine.json", scratch=tmp_path, cache=cache)


def test_a_new_commit_with_the_same_weights_is_the_same_teacher(
    hub: ModelHub, tiny_llava, build_cache, tmp_path, caplog
):
    old = hub.publish(NAME, tiny_llava)
    cache = tmp_path / "cache"
    build_cache(cache, limit=4, teacher=NAME)
    copy = tmp_path / "copy"
    shutil.copytree(tiny_llava, copy)
    (copy / "README.md").write_text("a card, later")
    new = hub.publish(NAME, copy)
    assert build_cache(cache, limit=4, teacher=NAME).built == 0
    assert f"teacher.revision = '{old}' and keeps that; '{new}'" in caplog.text


@pytest.mark.slow
def test_the_processes_of_a_build_use_what_the_first_one_found(hub: ModelHub, tiny_llava, tmp_path, monkeypatch):
    hub.publish(NAME, tiny_llava)
    # They read the environment anew: of these nobody answers.
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    config = BuildConfig(
        cache=str(tmp_path / "cache"),
        teacher=NAME,
        template="short",
        limit=2,
        shard_size=2,  # one shard, so one process is started
        batch_size=2,
        fidelity_samples=0,
    )
    assert extract_with_processes(config, 2).built == 1
    assert read_plan(tmp_path / "cache").teacher["name"] == NAME


def test_a_model_that_is_no_teacher_is_refused_before_its_weights_travel(hub: ModelHub, build_cache, tmp_path):
    hub.publish("org/words", {"config.json": b'{"model_type": "llama"}', "model.safetensors": b"w" * 9_000})
    with pytest.raises(ModelError, match="a language model alone"):
        build_cache(tmp_path / "cache", teacher="org/words")
    assert not [path for _, path, _ in hub.requests if path.endswith(".safetensors")]


@pytest.mark.slow
def test_the_command_line_tells_nothing_of_requests(hub: ModelHub, tiny_llava, tmp_path):
    hub.publish(NAME, tiny_llava)
    program = [sys.executable, "-m", "vlm_distill_cache.stage1_teacher.cli", "build", "--teacher", NAME, "--limit", "2"]
    options = ["--cache", str(tmp_path / "cache"), "--set", "fidelity_samples=0", "--set", "template=short"]
    plain = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment = plain | {"HF_HOME": str(tmp_path / "h"), "HF_ENDPOINT": hub.url, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run([*program, *options], env=environment, capture_output=True, text=True, check=True)
    assert "HTTP" not in ran.stdout + ran.stderr
    assert ran.stderr.count(f"teacher: downloading {NAME}@") == 1
    assert "\r" not in ran.stderr
    assert f"  teacher {NAME}@" in ran.stdout
