"""Students that feed fewer visual tokens, from options to the folder that is scored, exported and resumed."""

import json

import pytest
import torch
from tiny_cache import DATA
from train_runs import make_config

from vlm_distill_cache.common.errors import ConfigError, ModelError
from vlm_distill_cache.common.files.hashing import fingerprint
from vlm_distill_cache.common.files.signed import list_files
from vlm_distill_cache.stage2_student.config import TOKEN_OPTIONS, TrainConfig, describe
from vlm_distill_cache.stage2_student.final_folder import read_final
from vlm_distill_cache.stage2_student.prune.tokens import select_tokens
from vlm_distill_cache.stage2_student.scores.token_words import token_words
from vlm_distill_cache.stage2_student.train import train
from vlm_distill_cache.stage2_student.trained_student import export_student, open_student

QUICK = {"phases": ["dft"], "dft": {"steps": 3, "batch_size": 4, "losses": {"logits": 1.0}}}


def options(**given):
    return TrainConfig(cache="c", output="o", **given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"visual_tokens": 1.0}, "a share below 1, or a whole number of 2 or more"),
        ({"visual_tokens": 2.5}, "a share below 1"),
        ({"decoding_tokens": 0.0}, "decoding_tokens"),
        ({"token_selection": "grid"}, "set visual_tokens, too"),
        ({"merge_frames": 0.8}, "set visual_tokens, too"),
        ({"decoding_selection": "fixed"}, "set decoding_tokens, too"),
        ({"visual_tokens": 0.5, "sink_penalty": 0.1}, "it is of token_selection=sinks"),
        ({"decoding_tokens": 0.5, "decoding_selection": "fixed", "shift_threshold": 0.5}, "nothing is noticed there"),
    ],
)
def test_numbers_that_are_none_and_choices_of_nothing_are_refused(given, message):
    with pytest.raises(ConfigError, match=message):
        options(**given)


def test_runs_without_a_choice_are_described_as_before_and_each_choice_is_another_run():
    plain = describe(options(), {})
    assert not {name for head, names in TOKEN_OPTIONS.items() for name in (head, *names)} & plain.keys()
    others = [
        {"visual_tokens": 0.5},
        {"visual_tokens": 8.0},
        {"visual_tokens": 0.5, "token_selection": "random"},
        {"decoding_tokens": 0.5},
        {"decoding_tokens": 0.5, "decoding_selection": "fixed"},
    ]
    assert len({fingerprint(plain), *(fingerprint(describe(options(**given), {})) for given in others)}) == 6


@pytest.fixture(scope="module")
def by_gaze(tiny_cache, tmp_path_factory):
    """A student that learned to feed half of its visual tokens, those of the teacher's gaze."""
    config = make_config(
        tiny_cache[0], tmp_path_factory.mktemp("gaze") / "run", visual_tokens=0.5, token_selection="gaze",
        decoding_tokens=0.5, **QUICK,
    )  # fmt: skip
    return config, train(config)


def test_a_run_by_gaze_resumes_bit_for_bit_and_needs_no_teacher_afterwards(by_gaze, tmp_path, monkeypatch):
    config, result = by_gaze
    again = make_config(
        config.cache, tmp_path / "run", visual_tokens=0.5, token_selection="gaze", decoding_tokens=0.5,
        **QUICK | {"checkpoint_every": 1},
    )  # fmt: skip

    class StoppedError(Exception):
        pass

    def kill(position, _):
        if position.step == 2:
            raise StoppedError

    with pytest.raises(StoppedError):
        train(again, after_step=kill)
    # The regression is not fitted again: what it is fitted on may be read elsewhere by then.
    monkeypatch.setattr("vlm_distill_cache.stage2_student.training.token_choice.fit_on_tower", lambda *_, **__: 1 / 0)
    resumed = train(again)
    names = ["model.safetensors", "config.json"]
    assert list_files(resumed.final, names) == list_files(result.final, names)
    student = open_student(result.final, device="cpu")
    stored = student.model.config.distilled
    assert stored["visual_tokens"]["keep"] == 0.5
    assert stored["visual_tokens"]["gaze"]["weights"] == json.loads((tmp_path / "run/gaze.json").read_text())["weights"]
    assert "expects the teacher to look" in token_words(result.final)["visual_tokens"]
    assert "50 % of a picture's are fed" in (result.final / "README.md").read_text()


def test_layouts_that_cannot_say_it_refuse_and_an_export_says_it(by_gaze, tmp_path):
    final = by_gaze[1].final
    for layout in ("published", "llava-hf", "gguf"):
        with pytest.raises(ModelError, match="decoding_tokens, visual_tokens, which that layout cannot say"):
            export_student(final, tmp_path / layout, layout=layout)
    export_student(final, tmp_path / "auto")
    assert token_words(tmp_path / "auto") == token_words(final)


def test_a_finished_student_is_changed_without_training_and_scored(by_gaze, tiny_cache, tmp_path):
    final, (cache, _) = by_gaze[1].final, tiny_cache
    for by in ("sinks", "gaze", "grid"):
        target = tmp_path / by
        config = TrainConfig(cache=str(cache), output=str(target), data=DATA, visual_tokens=4.0, token_selection=by)
        said = select_tokens(final, target, config, cache=str(cache))
        assert said["visual_tokens"].startswith("at most 4 of a picture's")
        read_final(target)  # whole
        changed, before = (open_student(folder, device="cpu").model for folder in (target, final))
        same = zip(changed.state_dict().items(), before.state_dict().items(), strict=True)
        assert all(name == other and torch.equal(value, kept) for (name, value), (other, kept) in same)
    with pytest.raises(ConfigError, match="takes what a teacher's cache holds"):
        select_tokens(final, tmp_path / "no", config, cache=None) if by != "grid" else select_tokens(
            final, tmp_path / "no", options(visual_tokens=0.5, token_selection="sinks"), cache=None
        )
