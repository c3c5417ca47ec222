"""Students on a hub: what arrives is what was pushed, nothing of others is lost, and a push can be repeated at any time."""

import shutil

import PIL.Image
import pytest
from click.testing import CliRunner
from hub_server import TOKEN, ModelHub, use_models
from servers import Fault

from vlm_distill_cache.common.files.signed import list_files, write_signed
from vlm_distill_cache.common.hub import model_folder
from vlm_distill_cache.stage2_student.cli import main
from vlm_distill_cache.stage2_student.final_folder import PROVENANCE, read_final
from vlm_distill_cache.stage2_student.scores.card import SCORES, is_unedited

NAME = "me/student"
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # of the hub's library


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with ModelHub(tmp_path) as server:
        use_models(monkeypatch, server.url, tmp_path / "home")
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", False)  # this hub has none, and says so
        monkeypatch.setattr("vlm_distill_cache.common.remotes.streams.wait", lambda seconds: None)
        yield server


def push(*arguments):
    done = CliRunner().invoke(main, ["push", *map(str, arguments)])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done


def test_a_pushed_run_is_private_and_reads_back_equal(hub, copied, monkeypatch):
    final = copied / "distilled" / "final"
    (final / "notes.txt").write_text("mine alone")
    wanted = push(copied, NAME, "--dry-run")
    assert wanted.exit_code == 0, wanted.output
    assert hub.made == hub.commits == []
    assert "new, private" in wanted.output
    assert "send: model.safetensors (" in wanted.output
    done = push(copied, NAME, "--message", "First")
    assert done.exit_code == 0, done.output
    assert (hub.made[0]["visibility"], hub.commits) == ("private", ["First"])
    there = hub.files(NAME)
    own = read_final(final)["files"]
    assert there.keys() == {*own, PROVENANCE, SCORES, "README.md", ".gitattributes"}
    assert all(there[name] == (final / name).read_bytes() for name in (*own, PROVENANCE, SCORES))
    assert f'from_pretrained("{NAME}"' in there["README.md"].decode()
    assert is_unedited(there["README.md"].decode())
    again = push(copied, NAME)
    assert "Everything is there already" in again.output
    assert len(hub.commits) == 1
    read = model_folder(NAME, what="student").path
    assert read_final(read) == read_final(final)
    assert list_files(read, [name for name in own if not name.endswith(".py")]).items() <= own.items()
    # The lines of the card do what they say, code included.
    monkeypatch.chdir(copied.parent)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(copied.parent / "modules"))
    PIL.Image.new("RGB", (40, 30), "red").save("picture.jpg")
    lines = there["README.md"].decode().partition("```python\n")[2].partition("```")[0]
    said = {}
    exec(lines.replace("print(", "said = ("), said)
    assert isinstance(said["said"], str)


def test_a_push_ends_with_a_step_that_can_be_done(hub, copied):
    final = copied / "distilled" / "final"
    provenance = read_final(final)
    for layout in ("auto", "adapter", "gguf"):
        export = {"layout": layout, "dtype": "float32", "quantise": None, "made_from": {"files": {}, "export": None}}
        write_signed(final / PROVENANCE, provenance | {"export": export})
        done = push(final, f"me/{layout}")
        assert "Pushed " in done.output
        assert ("Next: distill evaluate me/auto" in done.output) is (layout == "auto")


def test_nothing_of_others_is_replaced_or_shown_to_everybody_unasked(hub, copied):
    final = copied / "distilled" / "final"
    hub.publish(NAME, {"model-00001-of-00002.safetensors": b"a" * 3000, "config.json": b"{}", "photo.png": b"p"})
    before = hub.files(NAME)
    for arguments, words in (
        ([final, NAME], "holds another model, or files that were edited there: config.json, model-00001"),
        ([final, NAME, "--overwrite"], "is public: everybody could read the student; add --public"),
        ([final, f"{NAME}@v1", "--revision", "v2"], "expected the repository as org/name"),
        ([final, "student"], "expected the repository as org/name"),
        ([final, NAME, "--which", "sft"], "is one student, not a run"),
        ([copied.parent, NAME], "no student there"),
    ):
        refused = push(*arguments)
        assert refused.exit_code == 1
        assert words in refused.output
        assert len(refused.output.splitlines()) == 1
    assert hub.files(NAME) is before
    hub.private.add(NAME)
    wanted = push(final, NAME, "--overwrite", "--public", "--dry-run").output
    assert "remove: model-00001-of-00002.safetensors" in wanted
    assert "replace: config.json" in wanted
    done = push(final, NAME, "--overwrite", "--public")
    assert "is private and stays so" in done.output
    assert hub.made == []
    there = hub.files(NAME)
    assert "model-00001-of-00002.safetensors" not in there
    assert there["photo.png"] == b"p"
    assert there["config.json"] == (final / "config.json").read_bytes()
    # Somebody writes on its card there: neither the next push nor a new branch changes that.
    hub.publish(NAME, there | {"README.md": b"---\nlicense: mit\n---\nMine"})
    assert "edited there: README.md" in push(final, NAME).output
    hub.publish("me/other", {"config.json": b"{}"})
    hub.private.add("me/other")
    assert push(final, "me/other", "--revision", "v1").exit_code == 0
    assert hub.files("me/other") == {"config.json": b"{}"}
    assert hub.files("me/other", "v1").keys() >= {"config.json", "model.safetensors"}


def test_scores_and_a_new_card_follow_a_student_that_is_there(hub, copied):
    sft = copied / "sft" / "final"
    scores = (sft / SCORES).read_bytes()
    (sft / SCORES).unlink()
    assert push(copied, NAME, "--which", "sft").exit_code == 0
    (sft / SCORES).write_bytes(scores)
    assert push(sft, NAME).exit_code == 0
    assert (len(hub.commits), hub.files(NAME)[SCORES]) == (2, scores)
    (sft / "README.md").write_text("---\nlicense: mit\n---\nMine")
    assert push(sft, NAME).exit_code == 0
    assert hub.files(NAME)["README.md"] == (sft / "README.md").read_bytes()
    (sft / "README.md").write_text("---\nlicense: nonsense\n---\nMine")
    assert "correct the lines between `---` at its head" in push(sft, NAME, "--overwrite").output


@pytest.mark.slow
def test_a_push_that_fails_anywhere_goes_on_and_ends_as_one_that_did_not(hub, copied):
    final = copied / "distilled" / "final"
    hub.concerns = lambda method, path: True
    for number in range(40):
        name = f"me/student-{number}"
        hub.faults = [Fault()] * number + [Fault(status=403)]
        failed = push(final, name)
        reached = not hub.faults
        hub.faults = []
        assert not failed.exit_code or "error: " in failed.output
        assert TOKEN not in failed.output
        again = push(final, name)
        assert again.exit_code == 0, (number, again.output)
        if not reached:
            break
    assert number > 8
    assert len(hub.commits) == number + 1
    assert hub.files("me/student-0").keys() == hub.files(name).keys()
    assert hub.private == {f"me/student-{at}" for at in range(number + 1)}


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (Fault(status=401), "log in with `hf auth login` or set HF_TOKEN, with the right to write"),
        (Fault(status=403), "log in with `hf auth login` or set HF_TOKEN, with the right to write"),
        (Fault(status=404), "log in with `hf auth login` or set HF_TOKEN, with the right to write"),
        *((Fault(status=status), "would be refused again: correct what the hub names") for status in (400, 422)),
        *((Fault(status=status), "the hub does not do this") for status in (405, 416, 418, 501)),
        (Fault(status=413), "takes nothing as large as this"),
        (Fault(status=507), "no room left on the hub"),
        (Fault(status=200), "failed 5 times, lastly: an answer that makes no sense"),
        (Fault(status=409), "failed 5 times"),
        (Fault(status=429, headers={"Retry-After": "1"}), "failed 5 times"),
        (Fault(status=503), "failed 5 times"),
    ],
)
@pytest.mark.slow(quick=1)
def test_what_a_hub_refuses_ends_in_a_line_and_what_may_pass_is_tried_again(hub, copied, fault, words):
    hub.concerns = lambda method, path: method == "POST" and "/commit/" in path
    hub.always = fault
    refused = push(copied, NAME)
    assert refused.exit_code == 1
    assert words in refused.output.splitlines()[-1]
    assert ("failed" in words) == ("check the network and the hub's address (http://" in refused.output)
    assert TOKEN not in refused.output
    hub.faults, hub.always = [fault] if "failed" in words else [], Fault()
    assert push(copied, NAME).exit_code == 0


def test_a_lost_answer_a_commit_of_others_and_what_arrives_otherwise_are_noticed(hub, copied, monkeypatch):
    hub.concerns = lambda method, path: method == "POST" and "/commit/" in path
    hub.faults = [Fault(cut=0)]  # the commit was made
    assert push(copied, NAME).exit_code == 0
    assert len(hub.commits) == 1
    hub.spoil = b"x" * 3000
    assert "did not arrive as it was sent: README.md, " in push(copied, "me/spoilt").output
    hub.spoil = None
    hub.private.clear()
    hub.publish("me/busy", {"a.txt": b"a"})
    hub.private.add("me/busy")
    look = hub.take

    def commit_first(method, path, wanted):
        if "preupload" in path and len(hub.files("me/busy")) == 1:
            hub.publish("me/busy", {"a.txt": b"a", "config.json": b"theirs"})
        return look(method, path, wanted)

    monkeypatch.setattr(hub, "take", commit_first)
    assert "holds another model, or files that were edited there: config.json" in push(copied, "me/busy").output
    assert hub.files("me/busy") == {"a.txt": b"a", "config.json": b"theirs"}


def test_damage_and_a_hub_switched_off_are_refused_before_anything_is_sent(hub, copied, monkeypatch):
    final = copied / "distilled" / "final"
    (final / "model.safetensors").write_bytes(b"0")
    assert "damaged or changed" in push(copied, NAME).output
    shutil.copytree(copied / "sft" / "final", copied.parent / "copy")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "switched off by HF_HUB_OFFLINE=1" in push(copied.parent / "copy", NAME).output
    assert hub.requests == []
