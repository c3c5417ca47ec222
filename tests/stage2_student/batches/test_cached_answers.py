"""Where a cache holds answers that the teacher wrote, a student is trained on these and not on the data set's."""

from dataclasses import replace

import pytest
from test_check_cache import make_config

from vlm_distill_cache.common.codecs.registry import codec_from_dict
from vlm_distill_cache.common.config import config_from_dict
from vlm_distill_cache.common.errors import SampleError
from vlm_distill_cache.common.opening import open_cache
from vlm_distill_cache.data.registry import open_dataset
from vlm_distill_cache.stage1_teacher.config import BuildConfig
from vlm_distill_cache.stage1_teacher.demo.teacher import builtin_teacher_directory
from vlm_distill_cache.stage1_teacher.extract import extract
from vlm_distill_cache.stage2_student.batches.dataset import answered_sample
from vlm_distill_cache.stage2_student.config import TrainConfig
from vlm_distill_cache.stage2_student.training.preparation import prepare

DATA = "shapes:images=6"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    path = tmp_path_factory.mktemp("written") / "cache"
    extract(
        BuildConfig(
            cache=str(path),
            data=DATA,
            teacher=str(builtin_teacher_directory()),
            template="short",
            answers="generate",
            max_new_tokens=40,
            batch_size=4,
            shard_size=4,
            threads=1,
            fidelity_samples=2,
            max_failed_share=1.0,
            limit=6,
        )
    )
    return path


def data_set(cache):
    prepared = prepare(
        make_config(cache, data=DATA, dft={"steps": 1, "losses": {"logits": 1.0, "answer_attention": 1.0}})
    )
    return prepared, prepared.phases[0].dataset


def test_the_students_labels_are_the_tokens_of_the_cached_answers(written):
    cache, originals = open_cache(written), open_dataset(DATA)
    codec = codec_from_dict(cache.plan.signals["answers"])
    prepared, joined = data_set(written)
    places = {name: place for place, name in enumerate(originals.sample_ids)}
    changed = 0
    for position, sample_id in enumerate(joined.sample_ids):
        answers = codec.decode(cache.read(sample_id))
        encoded = joined.load(position).encoded
        said = prepared.tokenizer.decode(encoded.labels[encoded.supervised_rows], skip_special_tokens=True)
        assert said.split() == " ".join(answers).split()
        original = originals[places[sample_id]]
        assert [turn.question for turn in joined.sample(position).turns] == [t.question for t in original.turns]
        changed += [turn.answer for turn in original.turns] != list(answers)
    assert changed, "the teacher wrote exactly the data set's answers: nothing was tested"


def test_fine_tuning_without_signals_reads_the_cached_answers_too(written):
    _, joined = data_set(written)
    plain = prepare(make_config(written, data=DATA, dft={"steps": 1, "losses": {"lm": 1.0}})).phases[0].dataset
    for position in range(len(joined)):
        assert (plain.load(position).encoded.labels == joined.load(position).encoded.labels).all()


def test_other_questions_than_the_teacher_answered_are_refused(written):
    cache, sample = open_cache(written), open_dataset(DATA)[0]
    if sample.sample_id not in cache:
        sample = next(s for s in map(open_dataset(DATA).__getitem__, range(6)) if s.sample_id in cache)
    assert answered_sample(cache, sample).turns
    with pytest.raises(SampleError, match=r"answers were written.*build the cache again"):
        answered_sample(cache, replace(sample, turns=(*sample.turns, sample.turns[0])))


def test_a_run_on_written_answers_is_scored_against_the_teacher_on_them(written, tmp_path):
    from vlm_distill_cache.stage2_student.train import train
    from vlm_distill_cache.stage2_student.trained_student import join_cached, open_student, show_taught

    config = config_from_dict(
        TrainConfig,
        {"student": "mobilevlm-tiny", "data": DATA, "cache": str(written), "output": str(tmp_path), "device": "cpu",
         "phases": ["dft"], "dft": {"steps": 1, "losses": {"logits": 1.0}}, "evaluation": {"overlays": 2}},
    )  # fmt: skip
    student = open_student(train(config).final)
    cache = open_cache(written)
    cached = join_cached(student, config, cache, limit=4)
    assert cached is not None
    assert all(len(cached.load(place).targets["logits"].token_ids) for place in range(len(cached)))
    taught = show_taught({"distilled": student}, config, cache)
    assert [one.written for one in taught] == [True, True]
    assert all(one.words and one.said["distilled"] is not None for one in taught)
