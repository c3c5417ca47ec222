"""Students that feed fewer visual tokens, from options to the folder that is scored, exported and resumed."""

import json
import re

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from tiny_cache import DATA
from tiny_families import save_tiny
from train_runs import make_config

from vlm_distill_cache.common.attention.capture import AttentionCapture
from vlm_distill_cache.common.errors import CacheMismatchError, ConfigError, ModelError
from vlm_distill_cache.common.files.hashing import fingerprint
from vlm_distill_cache.common.files.signed import list_files
from vlm_distill_cache.common.models.tokens.budget import kept_count
from vlm_distill_cache.common.opening import open_cache
from vlm_distill_cache.stage2_student.batches.gaze import gaze_on
from vlm_distill_cache.stage2_student.cli import main
from vlm_distill_cache.stage2_student.config import TOKEN_OPTIONS, TrainConfig, describe
from vlm_distill_cache.stage2_student.final_folder import read_final
from vlm_distill_cache.stage2_student.losses.objective import Shares
from vlm_distill_cache.stage2_student.prune.tokens import select_tokens
from vlm_distill_cache.stage2_student.scores import oracle
from vlm_distill_cache.stage2_student.scores.oracle import followed, oracle_scores, read_oracle, refuse_no_choice
from vlm_distill_cache.stage2_student.scores.token_words import token_words
from vlm_distill_cache.stage2_student.students.library import core_of
from vlm_distill_cache.stage2_student.train import train
from vlm_distill_cache.stage2_student.trained_student import export_student, open_student

QUICK = {"phases": ["dft"], "dft": {"steps": 3, "batch_size": 4, "losses": {"logits": 1.0, "answer_attention": 1.0}}}


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
    assert "50 % of a picture's visual tokens are fed" in (result.final / "README.md").read_text()


def test_how_many_tokens_are_fed_is_said_before_and_behind_a_training(by_gaze, tiny_cache, tmp_path):
    fed = re.compile(r"feeds (\d+) of (\d+) visual tokens of a picture \(token_selection=gaze\)")
    found = fed.search((by_gaze[1].final / "README.md").read_text().replace("\\", ""))
    assert found is not None
    assert 2 * int(found[1]) in (int(found[2]), int(found[2]) + 1)
    arguments = ["train", "--cache", str(tiny_cache[0]), "--output", str(tmp_path / "run"), "--dry-run", "--data", DATA]
    given = ["student=mobilevlm-tiny", "visual_tokens=0.01", "token_selection=attention", "device=cpu"]
    told = CliRunner().invoke(main, [*arguments, *(word for one in given for word in ("--set", one))])
    assert told.exit_code == 0, told.output
    assert re.search(r"student: feeds 1 of \d+ visual tokens of a picture \(token_selection=attention\)", told.output)


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
        assert said["visual_tokens"].startswith("at most 4 of a picture's visual tokens")
        read_final(target)  # whole
        changed, before = (open_student(folder, device="cpu").model for folder in (target, final))
        same = zip(changed.state_dict().items(), before.state_dict().items(), strict=True)
        assert all(name == other and torch.equal(value, kept) for (name, value), (other, kept) in same)
    with pytest.raises(ConfigError, match="takes what a teacher's cache holds"):
        select_tokens(final, tmp_path / "no", options(visual_tokens=0.5, token_selection="sinks"), cache=None)
    with pytest.raises(ConfigError, match="token_selection=grid"):
        refuse_no_choice(changed, "it")


def kept_places(student, batch):
    """Which visual tokens of each sample ran in the last pass, in their order, bool ``[N]`` each."""
    places = core_of(student).language_model.places
    return [places[row][mask] >= 0 for row, mask in enumerate(batch.inputs.visual_mask) if mask.any()]


def test_training_and_the_oracle_feed_what_the_teacher_looked_at(by_gaze, tiny_cache):
    result = by_gaze[1]
    phase, student = result.preparation.phases[0], result.model
    batch = phase.dataset.batch(range(4))
    with torch.no_grad():
        phase.objective(student, AttentionCapture(student.language_model), batch, Shares())
    trained = kept_places(student, batch)
    cache = open_cache(tiny_cache[0])
    codec, tiles = cache.codec("answer_attention"), [found for found in batch.inputs.tiles if found]
    with_picture = [name for name, found in zip(batch.inputs.sample_ids, batch.inputs.tiles, strict=True) if found]
    own = [codec.decode(cache[name]).cells.mean(axis=(0, 1)) for name in with_picture]
    for kept, cells, of in zip(trained, own, tiles, strict=True):
        best = gaze_on(torch.from_numpy(cells), codec.cells_of(of), of).argsort(descending=True, stable=True)[
            : kept_count(0.5, len(kept))
        ]
        assert set(kept.nonzero()[:, 0].tolist()) == set(best.tolist())

    # The oracle knows pictures, not samples: the mean over all that is said of one.
    with followed(read_oracle(cache)), oracle_scores(student, batch.inputs.tiles, batch.inputs.image_hashes):
        student(**batch.inputs.model_inputs())
    hashes = [name for name in batch.inputs.image_hashes if any(name)]
    for kept, picture, of in zip(kept_places(student, batch), hashes, tiles, strict=True):
        same = [
            codec.decode(r).cells.sum(axis=(0, 1)) for _, r in cache.items() if r["image_hash"].tobytes() == picture
        ]
        total = np.sum(same, axis=0, dtype=np.float64)
        cells = torch.from_numpy((total / total.sum()).astype(np.float32))
        best = gaze_on(cells, codec.cells_of(of), of).argsort(descending=True, stable=True)[
            : kept_count(0.5, len(kept))
        ]
        assert set(kept.nonzero()[:, 0].tolist()) == set(best.tolist())
    with followed(read_oracle(cache)), pytest.raises(CacheMismatchError, match="no teacher's gaze on a picture"):
        oracle_scores(student, tiles[:1], [b"x" * 16])
    student(**batch.inputs.model_inputs())  # alone, by the regression
    assert all(int(kept.sum()) == kept_count(0.5, len(kept)) for kept in kept_places(student, batch))


def test_a_model_of_the_library_is_changed_and_says_what_it_needs_elsewhere(tmp_path):
    save_tiny("llava", tmp_path / "llava")
    arguments = ["select-tokens", str(tmp_path / "llava"), "--output", str(tmp_path / "few"), "--visual-tokens", "0.5"]
    result = CliRunner().invoke(main, [*arguments, "--decoding-tokens", "2"])
    assert result.exit_code == 0, result.output
    assert "elsewhere it needs trust_remote_code=True" in result.output
    assert "generated answers alone change by it" in result.output
    card = (tmp_path / "few" / "README.md").read_text()
    for line in (
        "50 % of a picture's visual tokens",
        "Elsewhere it needs `trust_remote_code=True`",
        "# llava, with fewer",
    ):
        assert line in card


def test_of_the_oracle_it_is_said_what_chose_and_nothing_else(by_gaze, tiny_cache, monkeypatch):
    monkeypatch.setattr(oracle, "read_oracle", lambda cache: None)  # held-out pictures, which this cache does not hold
    arguments = ["evaluate", str(by_gaze[1].final), "--cache", str(tiny_cache[0]), "--limit", "2"]
    result = CliRunner().invoke(main, [*arguments, "--oracle"])
    assert result.exit_code == 0, result.output
    assert "looked on the same pictures (--oracle)" in result.output
    assert "are fed into the language model" not in result.output
    assert "Next:" not in result.output
    assert "generated answers alone change" in result.output
