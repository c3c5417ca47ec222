"""Text of unknown origin is shown short and harmless, and says whose it is and what to do."""

import logging

import click
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from vlm_distill_cache.common.errors import DataError
from vlm_distill_cache.common.printing import MAX_SHOWN, brief, message, one_line, shorten_parts
from vlm_distill_cache.common.terminal.command_line import CommandGroup, _Shown

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
