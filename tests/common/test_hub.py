"""Models by their names on the hub: the real client library talks to a hub of ours, online, offline and cut off."""

import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import huggingface_hub.constants
import pytest
from hub_server import TOKEN, ModelHub, use_models
from servers import Fault

from vlm_distill_cache.common.errors import ModelError, TransferError
from vlm_distill_cache.common.hub import HubName, hub_name, model_folder, public_name, snapshot_name
from vlm_distill_cache.common.terminal.command_line import quiet_libraries

SMALL = {"config.json": b'{"model_type": "llava"}', "tokenizer.json": b"{}", "chat_template.jinja": b"x"}
WEIGHTS = b"w" * 5_000
SAFE = SMALL | {"model.safetensors": WEIGHTS}
USELESS = {
    "README.md": b"hello", "modeling_x.py": b"raise SystemExit", "model.gguf": b"g", "tf_model.h5": b"h", "onnx/config.json": b"{}",
    "onnx/model.onnx": b"o", "original/consolidated.00.pth": b"p", "consolidated.safetensors": b"c", "flax_model.msgpack": b"m",
    "pytorch_model.bin": b"b" * 3_000, "training_args.bin": b"t",
}  # fmt: skip


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with ModelHub(tmp_path) as server:
        use_models(monkeypatch, server.url, tmp_path / "home" / "hub")
        yield server


def switch_off(monkeypatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("org/name", HubName("org/name")),
        ("llava-hf/llava-1.5-7b-hf@v1.0", HubName("llava-hf/llava-1.5-7b-hf", "v1.0")),
        ("org/name@refs/pr/3", HubName("org/name", "refs/pr/3")),
        *((given, None) for given in (
            "gpt2", "", "a/b/c", "/a/b", "./a/b", "../b", "a/", "/a", "org/na me", "org/name@", "org/na--me", "org/a..b",
            "org/x.git", "org/name.", "org/name-", "org/.name", "org/" + "x" * 97, "org/n\u00e4me", "https://huggingface.co/org/name",
        )),
    ],
)  # fmt: skip
def test_names_follow_the_hubs_rules(given: str, expected: HubName | None):
    assert hub_name(given) == expected


def test_a_model_is_downloaded_once_without_code_and_without_what_is_not_read(hub: ModelHub):
    commit = hub.publish("org/name", SAFE | USELESS)
    found = model_folder("org/name", what="teacher")
    assert (found.name, found.revision) == ("org/name", commit)
    assert found.path.name == commit
    assert names(found.path) == SAFE.keys() | {"README.md"}  # for the licence that it states
    assert (found.path / "model.safetensors").read_bytes() == WEIGHTS
    hub.requests.clear()
    assert model_folder("org/name", what="teacher") == found
    assert not [path for _, path, _ in hub.requests if "/resolve/" in path]


def test_pickled_weights_are_taken_where_there_are_no_others(hub: ModelHub):
    hub.publish("org/name", SMALL | {"pytorch_model.bin": b"b" * 3_000, "training_args.bin": b"t", "tf_model.h5": b"h"})
    assert names(model_folder("org/name", what="student").path) == {*SMALL, "pytorch_model.bin"}


def test_parts_that_lie_beside_the_weights_are_taken(hub: ModelHub):
    files = {
        "config.json": b"{}",
        "adapter_config.json": b"{}",
        "adapter_model.safetensors": b"a",
        "non_lora_trainables.bin": b"n",
    }
    hub.publish("org/lora", files)
    assert names(model_folder("org/lora", what="teacher").path) == files.keys()


def test_offline_what_is_there_is_used_without_a_request(hub: ModelHub, monkeypatch):
    hub.publish("org/name", SAFE)
    found = model_folder("org/name", what="teacher")
    hub.requests.clear()
    switch_off(monkeypatch)
    assert model_folder("org/name", what="teacher") == found
    assert model_folder(f"org/name@{found.revision}", what="teacher") == found
    assert hub.requests == []


def test_branches_tags_and_commits_are_revisions(hub: ModelHub):
    old = hub.publish("org/name", SAFE)
    hub.publish("org/name", SAFE, ref="v1")
    hub.publish("org/name", SAFE, ref="refs/pr/3")
    new = hub.publish("org/name", SAFE | {"model.safetensors": b"n" * 5_000})
    assert model_folder("org/name", what="x").revision == new
    for revision in ("v1", "refs/pr/3", old):
        assert model_folder(f"org/name@{revision}", what="x").revision == old
    hub.requests.clear()
    model_folder(f"org/name@{old}", what="x")  # a commit never changes: there is nothing to ask
    assert hub.requests == []


def test_a_moved_branch_is_followed(hub: ModelHub):
    hub.publish("org/name", SAFE)
    model_folder("org/name", what="x")
    new = hub.publish("org/name", SAFE | {"model.safetensors": b"n" * 5_000})
    found = model_folder("org/name", what="x")
    assert found.revision == new
    assert (found.path / "model.safetensors").read_bytes() == b"n" * 5_000


def test_a_folder_comes_first(hub: ModelHub, tmp_path, monkeypatch):
    hub.publish("org/name", SAFE)
    monkeypatch.chdir(tmp_path)
    Path("org/name").mkdir(parents=True)
    hub.requests.clear()
    found = model_folder("org/name", what="x")
    assert found == (Path("org/name"), "name", "")
    assert hub.requests == []


def test_a_folder_of_the_cache_tells_whose_it_is(hub: ModelHub, tmp_path, monkeypatch):
    commit = hub.publish("org/name-1.5", SAFE)
    snapshot = model_folder("org/name-1.5", what="x").path
    switch_off(monkeypatch)
    moved = tmp_path / "elsewhere"
    shutil.copytree(tmp_path / "home", moved, symlinks=True)
    (tmp_path / "link").symlink_to(snapshot)
    repository = snapshot.parent.parent
    for place in (snapshot, tmp_path / "link", moved / "hub" / repository.name / "snapshots" / commit):
        assert model_folder(place, what="x") == (place, "org/name-1.5", commit)
        assert public_name(str(place)) == f"org/name-1.5@{commit}"
    for place in (repository, repository / "snapshots"):
        assert model_folder(place, what="x") == (snapshot, "org/name-1.5", commit)
    assert snapshot_name(tmp_path) is None
    assert public_name(str(tmp_path)) == str(tmp_path)
    assert public_name("mobilevlm") == "mobilevlm"


def test_of_several_snapshots_the_main_branch_decides(hub: ModelHub, tmp_path):
    first = hub.publish("org/name", SAFE)
    repository = model_folder("org/name", what="x").path.parent.parent
    second = hub.publish("org/name", SAFE | {"config.json": b"{ }"})
    model_folder("org/name", what="x")
    assert model_folder(repository, what="x").revision == second
    (repository / "refs" / "main").unlink()
    with pytest.raises(ModelError, match=f"(?s){'.*'.join(sorted((first, second)))}: give one of them"):
        model_folder(repository, what="teacher")


def test_links_without_their_blobs_are_told_of(hub: ModelHub, tmp_path):
    hub.publish("org/name", SAFE)
    copy = tmp_path / "copy"
    shutil.copytree(model_folder("org/name", what="x").path, copy, symlinks=True)
    with pytest.raises(ModelError, match=r"teacher .*copy: \S+ is a link to .*blobs.*cp -rL"):
        model_folder(copy, what="teacher")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("nowhere", r"there is no such folder, and a name on the hub is org/name or org/name@revision"),
        ("build/models/x", r"there is no such folder, and a name on the hub"),
        ("https://huggingface.co/org/name", r"an address; type org/name$"),
        ("https://huggingface.co/org/name/tree/v1", r"an address; type org/name@v1$"),
        ("hf://org/name@v1", r"an address; type org/name@v1$"),
        ("org/nome", r"there is no such folder, and no such repository on the hub \(http.*/org/nome\).*hf auth login"),
        ("org/private", r"no such repository on the hub.*or it is private.*HF_TOKEN"),
        ("org/gated", r"gated, and no token is given: accept its terms on http.*/org/gated, then.*`hf auth login` or set HF_TOKEN"),
        ("org/name@v9", r"no branch, tag or commit 'v9'; http.*/org/name/commits lists them, org/name alone"),
        ("org/gguf", r"holds only \.gguf, \.onnx files.*give the repository of the original model"),
        ("org/empty", r"holds no weights"),
        ("org/bare", r"holds no config.json"),
    ],
)  # fmt: skip
def test_a_name_that_cannot_be_had_says_what_to_type(
    hub: ModelHub, tmp_path, monkeypatch, caplog, given: str, says: str
):
    caplog.set_level(logging.INFO)
    monkeypatch.chdir(tmp_path)
    for name in ("org/name", "org/private", "org/gated"):
        hub.publish(name, SAFE)
    hub.private.add("org/private")
    hub.gated.add("org/gated")
    hub.publish("org/gguf", {"config.json": b"{}", "x.gguf": b"g", "x.onnx": b"o"})
    hub.publish("org/empty", {"README.md": b"x"})
    hub.publish("org/bare", {"model.safetensors": b"x"})
    with pytest.raises(ModelError, match=says) as error:
        model_folder(given, what="teacher")
    assert str(error.value).startswith(f"teacher {given}: ")
    assert "\n" not in str(error.value)
    assert "downloading" not in caplog.text
    assert not [path for method, path, _ in hub.requests if method == "GET" and "/resolve/" in path]


def test_a_token_opens_gated_and_private_models(hub: ModelHub, monkeypatch):
    hub.gated.add("org/gated")
    hub.private.add("org/private")
    for name in ("org/gated", "org/private"):
        commit = hub.publish(name, SAFE)
        monkeypatch.setenv("HF_TOKEN", "wrong")
        with pytest.raises(ModelError, match=r"your token is not let in|HF_TOKEN"):
            model_folder(name, what="teacher")
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        assert model_folder(name, what="teacher").revision == commit


def test_offline_a_model_that_is_not_there_says_how_to_bring_it(hub: ModelHub, monkeypatch):
    hub.publish("org/name", SAFE)
    switch_off(monkeypatch)
    says = r"HF_HUB_OFFLINE: unset it, or run `hf download org/name --revision v1` .*HF_HOME"
    with pytest.raises(ModelError, match=r"nothing of it is there.*" + says):
        model_folder("org/name@v1", what="teacher")
    assert hub.requests == []


def test_offline_a_part_of_a_model_is_none(hub: ModelHub, monkeypatch):
    index = json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}).encode()
    shards = {"model.safetensors.index.json": index, "model-1.safetensors": b"1", "model-2.safetensors": b"2"}
    hub.publish("org/name", SMALL | shards)
    found = model_folder("org/name", what="teacher")
    trees = found.path.parent.parent / "trees"
    switch_off(monkeypatch)
    (found.path / "model-2.safetensors").unlink()
    with pytest.raises(ModelError, match="missing"):
        model_folder("org/name", what="teacher")
    shutil.rmtree(trees, ignore_errors=True)  # caches of older libraries hold no list of files
    for lost, says in (
        ("model-2.safetensors", "model-2.safetensors is missing"),
        ("config.json", "config.json is missing"),
    ):
        (found.path / lost).unlink(missing_ok=True)
        with pytest.raises(ModelError, match=says):
            run_alone("org/name", HF_HUB_CACHE=huggingface_hub.constants.HF_HUB_CACHE, HF_HUB_OFFLINE="1")


CODE = """
import sys
from vlm_distill_cache.common.errors import DistillError
from vlm_distill_cache.common.hub import model_folder
try:
    print(model_folder(sys.argv[1], what="teacher").revision)
except DistillError as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""


def start_alone(name: str, **environment: str) -> subprocess.Popen[str]:
    plain = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    program = [sys.executable, "-c", CODE, name]
    return subprocess.Popen(program, env=plain | environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run_alone(name: str, **environment: str) -> str:
    with start_alone(name, **environment) as process:
        said, complained = process.communicate(timeout=60)
    if process.returncode:
        raise ModelError(complained)
    return said.strip()


def test_the_librarys_own_variables_hold(hub: ModelHub, tmp_path):
    hub.gated.add("org/name")
    commit = hub.publish("org/name", SAFE)
    home = {"HF_HOME": str(tmp_path / "other"), "HF_ENDPOINT": hub.url}
    assert run_alone("org/name", **home, HF_TOKEN=TOKEN) == commit
    assert (tmp_path / "other" / "hub" / "models--org--name" / "snapshots" / commit / "config.json").is_file()
    hub.requests.clear()
    assert run_alone("org/name", **home, HF_HUB_OFFLINE="1") == commit
    assert hub.requests == []


def test_without_a_network_it_fails_within_seconds(tmp_path):
    cache, began = {"HF_HOME": str(tmp_path)}, time.monotonic()
    for address in ("http://127.0.0.1:9", "http://nowhere.invalid"):
        with pytest.raises(
            ModelError, match=rf"TransferError: .*\({address}\) cannot be reached.*`hf download org/name`.*HF_HOME"
        ):
            run_alone("org/name", **cache, HF_ENDPOINT=address)
    assert time.monotonic() - began < 30


def test_without_a_network_what_is_there_is_used_and_said(hub: ModelHub, monkeypatch, caplog):
    commit = hub.publish("org/name", SAFE)
    model_folder("org/name", what="teacher")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert model_folder("org/name", what="teacher").revision == commit
    assert re.search(f"cannot be reached.*: the copy in the hub's cache is used: org/name@{commit}", caplog.text)


def test_a_hub_that_does_not_answer_is_given_up(hub: ModelHub, monkeypatch):
    hub.publish("org/name", SAFE)
    hub.always = Fault(hang=True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_ETAG_TIMEOUT", 1)
    with pytest.raises(TransferError, match="cannot be reached"):
        model_folder("org/name", what="teacher")


@pytest.mark.parametrize(
    "fault", [Fault(status=503), Fault(status=200, body=b"<html>log in here</html>"), Fault(status=429)]
)
def test_what_is_no_answer_of_a_hub_is_told_in_a_line(hub: ModelHub, fault: Fault):
    hub.publish("org/name", SAFE)
    hub.always = fault
    with pytest.raises(TransferError, match=r"teacher org/name: .*the hub \(http") as error:
        model_folder("org/name", what="teacher")
    assert "\n" not in str(error.value)


def test_a_download_that_broke_off_goes_on_next_time(hub: ModelHub):
    commit = hub.publish("org/name", SAFE)
    hub.concerns = lambda method, path: method == "GET" and path.endswith(".safetensors")
    hub.always = Fault(status=500)
    with pytest.raises(TransferError, match="run the same command again"):
        model_folder("org/name", what="teacher")
    hub.always = Fault()
    hub.faults = [Fault(cut=1_000)]
    hub.requests.clear()
    found = model_folder("org/name", what="teacher")
    assert found.revision == commit
    assert (found.path / "model.safetensors").read_bytes() == WEIGHTS
    assert {path.rsplit("/", 1)[-1] for _, path, _ in hub.requests if "/resolve/" in path} == {"model.safetensors"}


def test_a_full_disk_is_named(hub: ModelHub, monkeypatch):
    hub.publish("org/name", SAFE)

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(huggingface_hub.file_download, "http_get", fail)
    with pytest.raises(
        TransferError, match=r"hub: No space left on device; make room, then run the same command again"
    ):
        model_folder("org/name", what="teacher")


def test_a_cache_that_cannot_be_written_is_named(hub: ModelHub, tmp_path, monkeypatch):
    hub.publish("org/name", SAFE)

    def fail(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(tmp_path))

    monkeypatch.setattr(huggingface_hub.file_download, "http_get", fail)
    with pytest.raises(TransferError, match=r"cannot be written \(Permission denied\); set HF_HOME"):
        model_folder("org/name", what="teacher")


def test_settings_are_judged_before_the_weights_travel(hub: ModelHub):
    hub.publish("org/name", SAFE)

    def refuse(folder: Path) -> None:
        raise ModelError(json.loads((folder / "config.json").read_text())["model_type"])

    with pytest.raises(ModelError, match=r"^llava$"):
        model_folder("org/name", what="teacher", check=refuse)
    assert not [path for _, path, _ in hub.requests if path.endswith(".safetensors")]


def test_where_nobody_watches_a_long_download_says_how_far_it_is(hub: ModelHub, monkeypatch, caplog):
    hub.publish("org/name", SMALL | {"model.safetensors": b"w" * 2_000_000})
    quiet_libraries()  # as every command does first
    monkeypatch.setattr("vlm_distill_cache.common.hub._EVERY_S", 0)
    caplog.set_level(logging.INFO)
    model_folder("org/name", what="teacher")
    assert "teacher: downloading org/name@" in caplog.text
    assert "downloading: 2.00MB of 2.00MB" in caplog.text


def test_of_several_processes_one_downloads(hub: ModelHub, tmp_path):
    commit = hub.publish("org/name", SMALL | {"model.safetensors": b"w" * 2_000_000})
    home = {"HF_HOME": str(tmp_path / "shared"), "HF_ENDPOINT": hub.url}
    processes = [start_alone("org/name", **home) for _ in range(3)]
    for process in processes:
        with process:
            assert process.communicate(timeout=60)[0].strip() == commit
    (weights,) = [size for path, size in hub.sent.items() if path.endswith(".safetensors")]
    assert weights == 2_000_000


@pytest.mark.slow
def test_ctrl_c_ends_a_download_quietly(hub: ModelHub, tmp_path):
    hub.publish("org/name", SMALL | {"model.safetensors": b"w" * 30_000_000})
    begun = threading.Event()
    hub.concerns = lambda method, path: method == "GET" and path.endswith(".safetensors")
    hub.always = Fault(trickle=True)
    hub.count = lambda path, size: begun.set() if path.endswith(".safetensors") else None  # type: ignore[method-assign]
    cache = tmp_path / "cache"
    program = [sys.executable, "-m", "vlm_distill_cache.stage2_student.cli", "import", "org/name", "--output", "o"]
    plain = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment = plain | {"HF_HOME": str(cache), "HF_ENDPOINT": hub.url}
    # A shell that runs the tests in the background has them, and what they start, ignore Ctrl-C.
    heeds = partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    options = {"env": environment, "stderr": subprocess.PIPE, "text": True, "cwd": tmp_path, "preexec_fn": heeds}
    with subprocess.Popen(program, **options) as process:
        assert begun.wait(60)
        process.send_signal(signal.SIGINT)
        time.sleep(1)  # else what ends the download may be the end of the file, on a busy machine
        hub.closing.set()  # a piece of the file ends here, at which the download looks up
        complained = process.communicate(timeout=30)[1]
    assert process.returncode == 130, complained
    assert "Traceback" not in complained
    assert "stopped; run the same command again" in complained
    assert not list(cache.rglob("*.incomplete"))
