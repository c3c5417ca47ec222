"""Text of unknown origin is shown short and harmless, and says whose it is and what to do."""

import logging
import random
import string
import time

import click
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from vlm_distill_cache.common.errors import DataError
from vlm_distill_cache.common.locations import public_location
from vlm_distill_cache.common.printing import (
    MAX_SHOWN,
    brief,
    hide_secrets,
    holds_token,
    markdown,
    markdown_code,
    message,
    one_line,
    shorten_parts,
)
from vlm_distill_cache.common.terminal.command_line import CommandGroup, _Shown, say, show_failure

PAYLOAD = "iVBORw0KGgo/AAA+" * 4000
LONG_ID = "i" * 4096


@pytest.mark.parametrize(
    ("reason", "whose", "remedy"),
    [
        (f"sample 's1': image {PAYLOAD} cannot be read: too long; set images to another folder", "sample 's1': image",
         "cannot be read: too long; set images to another folder"),
        (f"sample 's1': image '{'a b ' * 9000}' is not a file; store it beside the data", "sample 's1': image 'a b",
         "is not a file; store it beside the data"),
        (f"sample {LONG_ID!r}: the answer of turn 1 is empty", "sample 'iii", "': the answer of turn 1 is empty"),
        ("\x1b[31m\n" * 500 + "; remove it", r"\x1b[31m\n", "; remove it"),
        (f"{'word ' * 500}; make it shorter", "word word", "; make it shorter"),
    ],
    ids=["base64", "quoted", "id", "escapes", "words"],
)  # fmt: skip
def test_a_long_reason_keeps_whose_it_is_and_what_to_do(reason: str, whose: str, remedy: str):
    shown = brief(reason)
    assert len(shown) <= MAX_SHOWN
    assert shown.startswith(whose)
    assert shown.endswith(remedy)
    assert shown.isprintable()


@given(st.text(max_size=2000))
def test_what_is_shown_prints_is_short_and_of_short_texts_is_all(text: str):
    for shown, limit in ((brief(text), MAX_SHOWN), (one_line(text, limit=20), 20)):
        assert shown.isprintable()
        assert len(shown) <= limit
        assert shown == text or len(text) > limit or not text.isprintable()
    assert all(line.isprintable() and len(line) <= 2000 for line in message(text).split("\n"))


def test_the_words_of_a_message_and_the_options_it_proposes_are_not_cut():
    off = " ".join(f"phase{n}.losses.answer_attention=0" for n in range(20))
    said = f"the teacher's picture isn't there; it's the student's: SET=\"{off}\" with make, for all of the teachers' {'x' * 900}"
    shown = shorten_parts(said)
    assert f'SET="{off}" with make' in shown
    assert "the teacher's picture isn't there; it's the student's" in shown
    assert "x" * 400 not in shown


def test_an_error_on_screen_is_short_and_cannot_control_the_terminal():
    @click.group(cls=CommandGroup)
    def group() -> None: ...

    @group.command()
    def fail() -> None:
        raise DataError(f"sample {LONG_ID!r}: image {PAYLOAD}\x1b[2J cannot be read\nset images to another folder")

    result = CliRunner().invoke(group, ["fail"])
    assert result.exit_code == 1
    assert len(result.output) < 1000
    assert "\x1b" not in result.output
    assert result.output.startswith("error: sample 'iii")
    assert result.output.endswith("cannot be read\nset images to another folder\n")


def test_a_warning_on_screen_is_short_too():
    record = logging.LogRecord(
        "x", logging.WARNING, "x.py", 1, "%s holds %s", ("the folder", PAYLOAD + "\x1b[2J"), None
    )
    shown = _Shown("%(message)s").format(record)
    assert shown.startswith("the folder holds iVBOR")
    assert len(shown) < 400
    assert shown.isprintable()


@pytest.mark.parametrize(
    ("secret", "shown"),
    [
        ("https://host:8443/a/b?X-Amz-Signature=SECRET&y=SECRET", "https://host:8443/a/b?..."),
        ("http://me:SECRET@host/a", "http://host/a"),
        ("https://SECRET@host/a?SECRET", "https://host/a?..."),
        ("s3://AKIASECRET:SEC/RET+SECRET@bucket/a", "s3://bucket/a"),
        ("https://host/?sig=SE'CRE\"T<SECRET>&x=SECRET", "https://host/?..."),
        ("http://me:SE@CRET@host/a", "http://host/a"),
        ("gs://bucket/a?sig=SECRET", "gs://bucket/a?..."),
        ("s3a://AKIASECRET:SE/CRET@bucket", "s3a://bucket"),
        ("ftp://me:SECRET@host/a?SECRET", "ftp://host/a?..."),
        ("s3:/AKIASECRET:SECRET@bucket/a", "s3:/bucket/a"),
        ("http://ho st/a?sig=SECRET", "http://ho st/a?..."),
        ("hf_SECRETSECRETSECRETSECRET", "hf_..."),
        ("X-Amz-Credential=SECRET", "X-Amz-Credential=..."),
        ("x-amz-signature='SECRET", "x-amz-signature=..."),
    ],
)
def test_secrets_of_addresses_are_shown_nowhere(secret: str, shown: str, capsys):
    for form in ("{}", "error: '{}' is wrong; mend it", 'see {}, then ("{}") again'):
        for show in (one_line, brief, message, hide_secrets):
            assert show(form.replace("{}", secret)) == form.replace("{}", shown)
        say(form.replace("{}", secret))
        show_failure(ValueError, ValueError(secret), None)
    assert "SECRET" not in "".join(capsys.readouterr())
    assert "SECRET" not in public_location(secret) or "://" not in secret


@pytest.mark.parametrize(
    "harmless",
    [
        "hf://datasets/org/name@refs/pr/3", "s3://bucket/a@b", "https://host:8000/a@b:c", "org/name@main", "a?b=c",
        "hf_hub_download of hf_transfer", "/home/me/x@y:z@w", "http://127.0.0.1:80",
        "C:/me@home", "gs://b/a@b", "is it so? a=b",
    ],
)  # fmt: skip
def test_what_is_no_secret_stays(harmless: str):
    assert hide_secrets(harmless) == harmless == public_location(harmless)


UNITS = (
    "'a\\", '"a\\', "'\\", "' ", "'a'", "`a", "'", "' \"`", "\\", "'\\\n", "\n", "a ", "\x1b", "*", "http://", "http://?.",
    "http://a?b=", "s3://a:", "://a:@", "@://", "://a:80/", ":/a:", "@", "?", "hf_", "hf_a-", "x-amz-signature=",
)  # fmt: skip


@pytest.mark.parametrize("ends", [("", ""), ("http://'", "@")])
def test_no_text_makes_whoever_shows_it_wait(ends: tuple[str, str]):
    for unit in UNITS:
        text = ends[0] + unit * (200_000 // len(unit)) + ends[1]
        began = time.process_time()
        brief(text)
        markdown(text)
        message(text)
        assert time.process_time() - began < 2, unit  # linear: 50 ms


def test_errors_of_options_are_escaped_too():
    @click.group(cls=CommandGroup)
    def group() -> None: ...

    @group.command()
    def inspect() -> None: ...

    result = CliRunner().invoke(group, ["inspect", "a", "\x07\u202e https://host/a?SECRET"])
    assert result.exit_code == 2
    assert "Error: Got unexpected extra arguments (a \\x07\\u202e https://host/a?...)" in result.output


@given(st.text(alphabet="[]()!<>*_`|&~$\\{}#+-=:/.\"' \n\x1bab1;hrefsclt@", max_size=60))
def test_nothing_in_a_card_means_anything_to_a_reader_of_markdown(text: str):
    parser = pytest.importorskip("markdown_it").MarkdownIt("commonmark").enable(["table", "strikethrough"])
    tokens = parser.parse(
        f"| a | b |\n|---|---|\n| {markdown(text)} | {markdown_code(f'x{text}')} |\n\nsaid: {markdown(text)}\n"
    )
    *_, first, second, line = [token.children for token in tokens if token.type == "inline"]
    for children in (first, line):
        assert {child.type for child in children} <= {"text", "code_inline"}
    read = "".join(child.content for child in first).strip()
    assert read in (one_line(text).strip(), one_line(text).replace("`", "'").strip())
    assert [child.type for child in second] == ["code_inline"]
    assert second[0].content.strip() == one_line(f"x{text}").replace("`", "'").strip()


@pytest.mark.parametrize(
    "text", ["http://evil.example/x", "www.evil.example", "a@b.com", "ask @me", "MAILTO:a", "x:HTTPS://a"]
)
def test_what_becomes_a_link_by_itself_is_code_in_a_card(text: str):
    assert markdown(text) == f"`{text}`"
    assert markdown("org/name, 3 @ 4, no: link // here") == "org/name, 3 @ 4, no: link // here"


def test_the_token_of_this_machine_is_never_shown_whatever_it_looks_like(monkeypatch, tmp_path):
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    (tmp_path / "token").write_text("my own token!\n")
    assert hide_secrets("said: my own token!") == "said: ..."
    monkeypatch.setenv("HF_TOKEN", " other-secret\n")
    assert hide_secrets("other-secret of my own token!") == "... of ..."
    monkeypatch.setenv("HF_TOKEN", "a")  # hiding it would leave no text
    assert hide_secrets("a cat") == "a cat"


def test_a_token_of_the_hub_looks_drawn_by_lot_and_placeholders_do_not(monkeypatch):
    letters, draw = string.ascii_letters + string.digits, random.Random(0)
    for _ in range(100):
        assert holds_token(f"HF_TOKEN=hf_{''.join(draw.choices(letters, k=34))}")
        assert holds_token(f"hf_{''.join(draw.choices(string.ascii_letters, k=34))}")
    for harmless in (
        f"hf_{'x' * 34}",
        f"HF_{'X' * 34}",
        f"hf_A1{'x' * 32}",
        "hf_hubdownloadwithretryandresume",
        "hf_...",
    ):
        assert not holds_token(f"export HF_TOKEN={harmless}")
    monkeypatch.setenv("HF_TOKEN", f"hf_{'x' * 34}")  # this machine's own, whatever it looks like
    assert holds_token(f"login('hf_{'x' * 34}')")
