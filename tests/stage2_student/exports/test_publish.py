"""Students on a hub: what arrives is what was pushed, nothing of others is lost, and a push can be repeated at any time."""

import pytest
from click.testing import CliRunner
from hub_server import TOKEN, ModelHub, use_models

from vlm_distill_cache.common.files.signed import list_files
from vlm_distill_cache.common.hub import model_folder
from vlm_distill_cache.stage2_student.cli import main
from vlm_distill_cache.stage2_student.exports.card import SCORES, is_unedited
from vlm_distill_cache.stage2_student.final_folder import PROVENANCE, read_final

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
    assert list_files(read, own) == own
