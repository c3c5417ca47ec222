"""Mixtures through both stages: one cache of all, and one cache each."""

import io
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import yaml

from vlm_distill_cache.common.config import config_from_dict, config_to_dict
from vlm_distill_cache.common.errors import CacheMismatchError, ConfigError, DataError
from vlm_distill_cache.common.opening import open_cache
from vlm_distill_cache.data.registry import open_dataset
from vlm_distill_cache.stage2_student.config import SHARE_OF, TrainConfig, describe
from vlm_distill_cache.stage2_student.run import train_alone
from vlm_distill_cache.stage2_student.training.extension import differing_options
from vlm_distill_cache.stage2_student.training.preparation import open_cached_data, prepare
from vlm_distill_cache.stage2_student.training.resolve import open_caches
from vlm_distill_cache.stage2_student.training.stamp import refuse_other_run

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


def png(number):
    buffer = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    PIL.Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A JSON file of 8 samples with pictures beside it, a parquet file of 4, both with ids 0, 1, ..."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "pictures").mkdir()
    words = ("red", "blue", "green", "circle")
    entries = []
    for i in range(8):
        (folder / "pictures" / f"{i // 2}.png").write_bytes(png(i // 2))
        entries.append({"id": str(i), "image": f"{i // 2}.png", "question": "what colour ?", "answer": words[i % 3]})
    (folder / "a.json").write_text(json.dumps(entries))
    table = {
        "id": [str(i) for i in range(4)],
        "image": [{"bytes": png(90 + i), "path": None} for i in range(4)],
        "question": ["what shape ?"] * 4,
        "answer": [words[3]] * 4,
    }
    pq.write_table(pa.table(table), folder / "b.parquet", row_group_size=2)
    return folder


def mixture(folder, text, name="mixture.yaml"):
    (folder / name).write_text(text)
    return str(folder / name)


PARTS = "- {data: a.json, images: pictures}\n- {data: b.parquet, weight: 2.5}\n"
EACH = "- {data: a.json, images: pictures, cache: caches/a}\n- {data: b.parquet, weight: 2.5, cache: caches/b}\n"


def config(data, cache, output, **changes):
    options = {
        "student": "mobilevlm-tiny", "data": data, "cache": str(cache), "output": str(output), "device": "cpu",
        "phases": ["dft"], "dft": {"epochs": 2, "batch_size": 5, "losses": {"logits": 1.0, "answer_attention": 1.0}},
    }  # fmt: skip
    return config_from_dict(TrainConfig, options | changes)


@pytest.fixture(scope="module")
def caches(data, tmp_path_factory, tiny_llava):
    """A cache of the whole mixture, and one of each entry."""
    from vlm_distill_cache.stage1_teacher.config import BuildConfig
    from vlm_distill_cache.stage1_teacher.extract import extract

    common = {"teacher": str(tiny_llava), "template": "short", "shard_size": 4, "batch_size": 3, "fidelity_samples": 0}
    spec, each = mixture(data, PARTS), mixture(data, EACH, "each.yaml")
    for where, name in ((spec, "all"), (each, "a"), (each, "b")):
        extract(BuildConfig(data=where, cache=str(data / "caches" / name), **common))
    return spec, each


@pytest.mark.slow
def test_one_cache_of_all_holds_each_sample_once_and_says_of_what(caches, data):
    cache = open_cache(data / "caches" / "all")
    assert sorted(cache.sample_ids) == sorted(
        [*(f"a.json/{i}" for i in range(4)), *"4567", *(f"b.parquet/{i}" for i in range(4))]
    )
    assert cache.plan.data["mixture"] == [{"name": "a.json", "samples": 8}, {"name": "b.parquet", "samples": 4}]
    # As if each part were cached alone: the same records under the part's own ids.
    for part, ids in (("a", "0123"), ("b", "0123")):
        alone = open_cache(data / "caches" / part)
        for sample_id in ids:
            one = cache.read(f"{'a.json' if part == 'a' else 'b.parquet'}/{sample_id}")
            other = alone.read(sample_id)
            assert np.array_equal(one["labels"], other["labels"])
            assert np.array_equal(one["image_hash"], other["image_hash"])


def test_an_entrys_own_cache_is_that_of_its_data_alone(caches, data):
    plan = open_cache(data / "caches" / "b").plan
    assert plan.fingerprints["data"] == open_dataset(str(data / "b.parquet")).fingerprint()
    assert "mixture" not in plan.data


@pytest.mark.parametrize("each", [False, True])
def test_weights_count_in_stage_two(caches, data, tmp_path, each):
    spec, place = (caches[1], data / "caches" / "a") if each else (caches[0], data / "caches" / "all")
    phase = prepare(config(spec, place, tmp_path / "out")).phases[0]
    assert phase.shuffle.length == 8 + 10
    assert phase.steps == 8  # 2 epochs of 18 samples in steps of 5
    order = phase.shuffle.take(0, 18)
    questions = [phase.dataset.load(int(i)).encoded.labels for i in order]
    assert len(questions) == 18
    counts = np.bincount(order, minlength=12)
    assert sorted(counts.tolist()) == [1] * 8 + [2, 2, 3, 3]


@pytest.mark.parametrize("each", [False, True])
@pytest.mark.slow
def test_training_resumes_where_it_was_killed(caches, data, tmp_path, each):
    spec, place = (caches[1], data / "caches" / "a") if each else (caches[0], data / "caches" / "all")
    options = {"checkpoint_every": 3, "keep_checkpoints": 9, "log_every": 1}
    whole = train_alone(config(spec, place, tmp_path / "whole", **options)).log

    def stop(position, _):
        if position.total_steps == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_alone(config(spec, place, tmp_path / "killed", **options), after_step=stop)
    resumed = train_alone(config(spec, place, tmp_path / "killed", **options)).log
    losses = {record["step"]: record["total"] for record in resumed}
    assert {record["step"]: record["total"] for record in whole if record["step"] in losses} == losses
    assert max(losses) == 8


@pytest.mark.parametrize("each", [False, True])
@pytest.mark.slow
def test_a_share_of_the_data_is_drawn_at_random_from_each_part(caches, data, tmp_path, each):
    spec, place = (caches[1], "a") if each else (caches[0], "all")

    def drawn(**options):
        phase = prepare(config(spec, data / "caches" / place, tmp_path / "o", data_share=0.5, **options)).phases[0]
        loaded = [phase.dataset.load(i) for i in range(len(phase.dataset))]
        assert [sample.encoded.sample_id for sample in loaded] == list(phase.dataset.sample_ids)
        pictures = [bytes(sample.encoded.image_hash) for sample in loaded]
        return phase.shuffle.length, list(phase.dataset.sample_ids), pictures

    b_pictures = {bytes(open_cache(data / "caches" / "b").read(str(i))["image_hash"]) for i in range(4)}
    seeds = [drawn(seed=seed) for seed in range(4)]
    assert seeds[0] == drawn(seed=0)
    for length, ids, pictures in seeds:
        assert len(ids) == 6
        assert sum(picture in b_pictures for picture in pictures) == 2
        assert length == 4 + 5
    assert len({tuple(ids) for _, ids, _ in seeds}) > 1
    # `limit` comes first: half of the first 6, which are 4 and 2 of the parts.
    first = set(prepare(config(spec, data / "caches" / place, tmp_path / "o", limit=6)).phases[0].dataset.sample_ids)
    assert all(len(ids) == 3 and {*ids} <= first for _, ids, _ in (drawn(seed=seed, limit=6) for seed in range(3)))


def test_a_run_says_that_its_share_is_drawn_at_random_and_other_runs_are_what_they_were(caches, data, tmp_path):
    settings = config(caches[0], data / "caches" / "all", tmp_path / "o")
    whole, half = describe(settings, {}), describe(replace(settings, data_share=0.5), {})
    assert {name: half[name] for name in half.keys() - whole.keys()} == {"data_share_of": SHARE_OF}
    # As an older version wrote it, which took the first samples: another run, and why.
    older = {name: value for name, value in half.items() if name != "data_share_of"}
    (tmp_path / "o" / "distilled" / "checkpoints").mkdir(parents=True)
    with pytest.raises(
        ConfigError, match=r"data_share_of: the folder has 'nothing', this run has 'samples drawn at random"
    ):
        refuse_other_run(tmp_path / "o", {"run": older}, {"run": half}, hashes={})
    (tmp_path / "o" / "config.yaml").write_text(yaml.safe_dump(config_to_dict(replace(settings, data_share=0.5))))
    assert "first samples in older" in differing_options(tmp_path / "o", replace(settings, data_share=0.5), {})


def test_other_weights_are_another_run(caches, data, tmp_path):
    settings = config(caches[0], data / "caches" / "all", tmp_path / "o")
    before = describe(settings, {})
    mixture(data, PARTS.replace("2.5", "3"))
    try:
        assert describe(settings, {}) != before
    finally:
        mixture(data, PARTS)


def test_all_caches_of_the_entries_are_part_of_the_run(caches, data, tmp_path):
    settings = config(caches[1], data / "caches" / "a", tmp_path / "o")
    found = open_caches(settings)
    assert sorted(found) == [str(data / "caches" / name) for name in "ab"]
    hashes = {place: cache.manifest_hash for place, cache in found.items()}
    assert describe(settings, hashes)["dft"]["caches"] == [hashes[str(data / "caches" / name)] for name in "ab"]


def test_a_cache_of_one_entry_opens_that_entry(caches, data):
    for name, count in (("a", 8), ("b", 4)):
        cache = open_cache(data / "caches" / name)
        assert len(open_cached_data(cache, data=caches[1], images=None)) == count


def test_another_cache_than_the_entries_is_refused_with_theirs(caches, data, tmp_path):
    with pytest.raises(DataError, match=r"caches/all is none of them.*CACHE=.*caches/a, CACHE=.*caches/b"):
        open_caches(config(caches[1], data / "caches" / "all", tmp_path / "o"))


def test_caches_that_do_not_mean_the_same_are_refused_by_name(caches, data, tmp_path, build_cache):
    spec = mixture(data, EACH.replace("caches/b", "caches/other"), "other.yaml")
    build_cache(data / "caches" / "other", data=spec, limit=0, logits="lean", fidelity_samples=0)
    with pytest.raises(CacheMismatchError, match=r"caches/a and .*caches/other cannot be read together"):
        prepare(config(spec, data / "caches" / "a", tmp_path / "o"))


@pytest.mark.parametrize(("own", "asked", "taken"), [(3, 2, 2), (2, 3, 2), (3, 0, 3), (None, 3, 3)])
def test_the_smaller_of_both_limits_holds_for_an_entrys_own_cache(data, own, asked, taken):
    from vlm_distill_cache.stage1_teacher.config import BuildConfig
    from vlm_distill_cache.stage1_teacher.planning import open as opening

    limit = "" if own is None else f", limit: {own}"
    spec = mixture(data, EACH.replace("cache: caches/a", f"cache: caches/less{limit}"), "less.yaml")
    cache = data / "caches" / "less"
    config = opening._for_entry(BuildConfig(data=spec, cache=str(cache), limit=asked), str(cache))
    dataset = open_dataset(config.data, images=Path(config.images), limit=config.limit or None)
    assert len(dataset) == taken
    plan = SimpleNamespace(
        data={"name": dataset.name, "split": config.split, "limit": config.limit},
        fingerprints={"data": dataset.fingerprint()},
    )
    assert len(open_cached_data(SimpleNamespace(plan=plan), data=spec, images=None)) == taken


def test_a_callers_loop_reads_a_mixture_of_caches_and_a_live_teacher_all_of_its_parts(caches, data, tiny_llava):
    import vlm_distill_cache as vdc

    dataset = vdc.DistillationDataset(
        data / "caches" / "a", "mobilevlm-tiny", vdc.LossWeights(logits=1.0, answer_attention=1.0), data=caches[1]
    )
    order = list(dataset.sampler(seed=0))
    assert len(order) == 8 + 10  # the second part counts two and a half times
    assert set(order) == set(range(len(dataset))) == set(range(12))
    with pytest.raises(vdc.DataError, match=r"2 samples of the mixture have the id '0', at the positions \[0, 8\]"):
        dataset["0"]
    assert dataset["7"].encoded.sample_id == "7"
    common = {"teacher": str(tiny_llava), "template": "short"}
    teacher = vdc.LiveTeacher(vdc.BuildConfig(data=caches[1], cache=str(data / "caches" / "a"), **common))
    places = [10, 0, 8, 3]  # parts take turns, and both have a sample 0
    live, cached = dataset.live_batch(places, teacher), dataset.collate([dataset[place] for place in places])
    assert live.inputs.image_hashes == cached.inputs.image_hashes
    losses = [vdc.DistillationLoss(dataset)(dataset.student, batch) for batch in (live, cached)]
    for name, value in losses[1].terms.items():
        assert losses[0].terms[name].item() == pytest.approx(value.item(), rel=0.05, abs=1e-4), name
