"""The proposed next command works as it is printed: it names the data, and no loss that the cache cannot serve."""

import shlex

import pytest
from cache_factory import FIELDS, make_plan

from vlm_distill_cache.common.terminal.next_step import (
    DEFAULT_SHAPES,
    DEFAULT_SIGNALS,
    distill_command,
    set_words,
)
from vlm_distill_cache.data.registry import open_dataset

BOTH = {name: FIELDS["logits"] if name == "logits" else () for name in DEFAULT_SIGNALS}


def plan_of(name: str, *, signals=tuple(BOTH)):
    held = {signal: BOTH[signal] for signal in signals}
    return make_plan(data={"name": name}, signals={signal: {} for signal in signals}, fields=held)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (DEFAULT_SHAPES, ""),
        (f"{DEFAULT_SHAPES}[:64]", ""),
        ("shapes:images=20,seed=5", " DATA=shapes:images=20,seed=5"),
        ("shapes:images=9,seed=0,kinds=scene+motion[:4]", " DATA=shapes:images=9,seed=0,kinds=scene+motion"),
        ("easy-vqa/train[:9]", " DATA=easy-vqa"),
        ("photo-scenes:images=9,seed=0,ground=natural[:4]", " DATA=photo-scenes:images=9,seed=0,ground=natural"),
        ("easy-vqa/train + easy-vqa/test", " DATA=easy-vqa"),
        (f"{DEFAULT_SHAPES} + easy-vqa/train", " DATA=FILE IMAGES=FOLDER"),
        ("llava.json", " DATA=FILE IMAGES=FOLDER"),
        ("shapes:$(reboot)", " DATA=FILE IMAGES=FOLDER"),
        ("", " DATA=FILE IMAGES=FOLDER"),
    ],
)
def test_the_data_is_named_as_far_as_a_cache_tells_it(name: str, words: str):
    command = distill_command(plan_of(name), "my caches/x")
    assert command == f"make distill STUDENT=mobilevlm{words} CACHE='my caches/x'"


def test_the_data_that_make_takes_is_what_a_plan_calls_it():
    assert open_dataset("shapes").name == DEFAULT_SHAPES


def test_data_that_is_known_is_named_as_it_was_given():
    command = distill_command(plan_of("llava.json"), "c", data="my data/llava.json", images="pictures")
    assert shlex.split(command)[3:] == ["DATA=my data/llava.json", "IMAGES=pictures", "CACHE=c"]


def test_losses_without_a_signal_are_switched_off_in_words_that_a_shell_reads():
    command = distill_command(plan_of(DEFAULT_SHAPES, signals=("answer_attention",)), "c")
    assert shlex.split(command)[-1] == "SET=dpt.losses.logits=0 dft.losses.logits=0"
    command = distill_command(plan_of(DEFAULT_SHAPES, signals=("logits",)), "c")
    assert shlex.split(command)[-1] == "SET=dpt.losses.answer_attention=0 dft.losses.answer_attention=0"


def test_options_are_said_for_make_and_for_the_command_line():
    said = set_words(["a.b=1", "c=[2.0]"])
    assert said == "SET=\"a.b=1 c=[2.0]\" with make, else --set a.b=1 --set 'c=[2.0]'"
