"""What leaves the machine with a student: its own files, and nothing that a link or damage brings in."""

import os

import pytest
from click.testing import CliRunner

from vlm_distill_cache.common.cache.other_folders import refuse_inside
from vlm_distill_cache.common.errors import ConfigError, ModelError
from vlm_distill_cache.common.hub import HubName
from vlm_distill_cache.stage2_student.cli import main
from vlm_distill_cache.stage2_student.final_folder import PROVENANCE, read_final
from vlm_distill_cache.stage2_student.scores.card import SCORES
from vlm_distill_cache.stage2_student.scores.publish import _NO_BRANCH, _files_of, push_student

PLACE = HubName("me/student")


def contents(files):
    return {name: given if isinstance(given, bytes) else given.read_bytes() for name, given in files.items()}


def test_links_are_followed_inside_the_hubs_cache_and_nowhere_else(copied, tmp_path):
    final = copied / "distilled" / "final"
    (final / "LICENSE").write_text("mine")
    provenance = read_final(final)
    plain = contents(_files_of(final, provenance, PLACE))
    snapshot = tmp_path / "models--me--student" / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (blobs := tmp_path / "models--me--student" / "blobs").mkdir()
    for path in final.iterdir():
        path.rename(blobs / path.name)
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
        (final / path.name).symlink_to(blobs / path.name)  # as some lay out their folders
    assert contents(_files_of(snapshot, provenance, PLACE)) == plain
    for name in (SCORES, "LICENSE", PROVENANCE, "README.md"):  # no digest covers these
        with pytest.raises(ModelError, match=rf"{name}: a link, which is not followed; put the file itself there"):
            _files_of(final, provenance, PLACE)
        (final / name).unlink()
        (final / name).write_bytes((blobs / name).read_bytes())
    assert contents(_files_of(final, provenance, PLACE)) == plain  # what is listed was compared with its digest
    (tmp_path / "secret").write_text("key")
    (snapshot / "NOTICE").symlink_to(tmp_path / "secret")
    with pytest.raises(ModelError, match="NOTICE: a link"):
        _files_of(snapshot, provenance, PLACE)


def test_what_a_hub_would_refuse_or_nobody_could_read_is_named_before_it_is_sent(copied):
    final = copied / "sft" / "final"
    provenance = read_final(final)
    for name, content, words in (
        (SCORES, b"{}", "score the student again"),
        ("README.md", b"---\nlicense: mit\n---\n\xff", "README.md: not UTF-8"),
        ("README.md", b"x" * (4 << 20 | 1), r"README.md: larger than 4,194,304 bytes.*delete it for a new card"),
    ):
        before = (final / name).read_bytes()
        (final / name).write_bytes(content)
        with pytest.raises(ModelError, match=words):
            _files_of(final, provenance, PLACE)
        (final / name).write_bytes(before)


def test_no_token_leaves_with_a_student_or_its_message(copied, monkeypatch):
    final = copied / "sft" / "final"
    provenance = read_final(final)
    monkeypatch.setenv("HF_TOKEN", "in-use-here")
    for name in ("README.md", "LICENSE", "NOTICE.txt"):
        before = (final / name).read_bytes() if (final / name).exists() else b""
        for token in (b"in-use-here", b"hf_" + b"Ab1" * 11):
            (final / name).write_bytes(b"---\nlicense: mit\n---\nlogin(token='" + token + b"')")
            with pytest.raises(ConfigError, match=f"{name}: holds a token of the hub") as refused:
                _files_of(final, provenance, PLACE)
            assert token.decode() not in str(refused.value)
        (final / name).write_bytes(before or b"of hf_transformers and hf_hub_download")
    assert _files_of(final, provenance, PLACE).keys() >= {"README.md", "LICENSE", "NOTICE.txt"}
    with pytest.raises(ConfigError, match="--message: holds a token of the hub"):
        push_student(final, PLACE, message="with in-use-here")


def test_what_is_no_branch_is_refused_before_anything_is_read_or_asked(tmp_path):
    for branch in (
        "..", "-x", "a b", "refs/pr/1", "HEAD", "a" * 300, "@", "a..b", "a~1", "a^", "a:b", "a?", "a*", "a[", "a\\b", "/a",
        "a/", "a//b", ".a", "a/.b", "a.", "a.lock/b", "a@{b", "a\n", "a\x7f", "\udcff", "0" * 40,
    ):  # fmt: skip
        with pytest.raises(ConfigError, match="is no branch's name; expected one as git takes it"):
            push_student(tmp_path, PLACE._replace(revision=branch), dry_run=True)
    for good in ("main", "v1.0", "tests/long", "a@b", "HEADS", "\u00e9", "x" * 200):
        assert not _NO_BRANCH.fullmatch(good)


def test_nothing_is_written_into_a_students_folder(copied):
    final = copied / "sft" / "final"
    before = sorted(final.rglob("*"))
    for target in (final / "x", final / "x" / "y", copied / "x" / ".." / "sft" / "final" / "z"):
        with pytest.raises(ConfigError, match=r"lies in .*final, a student's folder"):
            refuse_inside(target)
    refuse_inside(copied / "x")
    done = CliRunner().invoke(main, ["export", str(final), "--output", str(final / "x")])
    assert (done.exit_code, "a student's folder" in done.output) == (2, True)
    assert sorted(final.rglob("*")) == before
    assert os.path.lexists(final / PROVENANCE)


def test_a_run_or_a_slip_of_the_pen_in_place_of_a_student_is_told_the_students_names(copied):
    for given, words in (
        (copied, "is the folder of a run or a training; give a student in it: {0}/distilled/final or {0}/sft/final"),
        (copied / "sft", "give a student in it: {0}/sft/final"),
        (copied / "sft" / "fnial", "is not there; is {0}/sft/final meant?"),
    ):
        for command in (["export", "--output", str(copied / "x")], ["evaluate"]):
            done = CliRunner().invoke(main, [command[0], str(given), *command[1:]])
            assert words.format(copied) in " ".join(done.output.split())
    (copied / "file").write_text("x")
    done = CliRunner().invoke(main, ["export", str(copied / "sft/final"), "--output", str(copied / "file" / "x")])
    assert "file is a file, so nothing can lie in it; give another folder" in " ".join(done.output.split())
