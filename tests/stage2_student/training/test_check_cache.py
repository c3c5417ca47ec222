"""Bad news before the first step: each misfit is refused with both values and the remedy."""

import json
import re
import shutil
from dataclasses import replace

import pytest
from tiny_cache import DATA, build_tiny_cache

from vlm_distill_cache.common.cache.documents import document_bytes, read_document
from vlm_distill_cache.common.cache.manifest import seal
from vlm_distill_cache.common.cache.plan import read_plan, write_plan
from vlm_distill_cache.common.config import config_from_dict, config_to_dict
from vlm_distill_cache.common.errors import CacheFormatError, CacheMismatchError, ConfigError
from vlm_distill_cache.common.opening import open_cache
from vlm_distill_cache.data.builtin import build_tokenizer
from vlm_distill_cache.data.registry import open_dataset
from vlm_distill_cache.data.text.templates import get_template
from vlm_distill_cache.stage2_student.config import TrainConfig
from vlm_distill_cache.stage2_student.loss_weights import LossWeights
from vlm_distill_cache.stage2_student.losses.terms import choose_terms
from vlm_distill_cache.stage2_student.students.build import load_student
from vlm_distill_cache.stage2_student.training.checks import (
    check_data,
    check_geometry,
    check_labels_fit,
    check_losses,
    check_signals,
    check_template,
    check_tokenizer,
    check_visual_rows,
)
from vlm_distill_cache.stage2_student.training.preparation import prepare

LOGITS = choose_terms(["logits"])


def make_config(cache, output="unused", **changes):
    options = {
        "student": "mobilevlm-tiny",
        "data": DATA,
        "cache": str(cache),
        "output": str(output),
        "phases": ["dft"],
        "dft": {"steps": 1, "losses": {"logits": 1.0}},
    }
    return config_from_dict(TrainConfig, options | changes)


def test_what_fits_is_accepted(tiny_cache):
    prepared = prepare(make_config(tiny_cache[0]))
    assert prepared.phases[0].steps == 1
    assert prepared.student.image_grid == (3, 3)


def test_an_unsealed_cache_is_refused_with_the_command_that_seals_it(tmp_path):
    build_tiny_cache(tmp_path / "c", data="shapes:images=1,seed=5", signals=("logits",), sealed=False)
    with pytest.raises(CacheFormatError, match=r"not sealed.*teacher-cache"):
        prepare(make_config(tmp_path / "c", data="shapes:images=1,seed=5"))


def test_a_damaged_cache_is_refused(tiny_cache, tmp_path):
    shutil.copytree(tiny_cache[0], tmp_path / "c")
    (tmp_path / "c" / "manifest.json").write_text("{")
    with pytest.raises(CacheFormatError):
        prepare(make_config(tmp_path / "c"))


def test_another_tokenizer_is_refused_with_both_fingerprints(tiny_cache):
    cache = open_cache(tiny_cache[0])
    other = build_tokenizer()
    other.eos_token = "<pad>"
    expected = cache.plan.fingerprints["tokenizer"]
    with pytest.raises(CacheMismatchError, match=rf"fingerprint [0-9a-f]+, .* used {expected}.*teacher that has"):
        check_tokenizer(cache, other, LOGITS, where="student X")


def test_another_template_is_refused_by_name(tiny_cache):
    cache = open_cache(tiny_cache[0])
    check_template(cache, get_template("short"), LOGITS)
    with pytest.raises(CacheMismatchError, match=r"'vicuna_v1' .* saw: 'short'.*Leave `template` unset"):
        check_template(cache, get_template("vicuna_v1"), LOGITS)
    with pytest.raises(CacheMismatchError, match="vicuna_v1"):
        prepare(make_config(tiny_cache[0], template="vicuna_v1"))


@pytest.mark.parametrize(
    ("data", "what"),
    [
        ("shapes:images=18,seed=5", "2 of the cache's 20 sample ids are missing"),
        ("shapes:images=21,seed=5", "samples were added"),
    ],
)
def test_other_data_is_refused_naming_both_fingerprints_and_what_is_missing(tiny_cache, data, what):
    cache = open_cache(tiny_cache[0])
    check_data(cache, open_dataset(DATA))
    with pytest.raises(CacheMismatchError, match=rf"fingerprint [0-9a-f]+\).*{what}.*teacher-cache build --data"):
        check_data(cache, open_dataset(data))


def test_a_merged_cache_fits_each_of_its_data_sets_and_no_other(tiny_cache):
    cache = open_cache(tiny_cache[0])
    part, other = open_dataset("shapes:images=3,seed=5"), open_dataset("shapes:images=3,seed=6")
    parts = [{"fingerprint": "a"}, {"fingerprint": part.fingerprint()}]
    cache.plan = replace(cache.plan, data=cache.plan.data | {"parts": parts})
    check_data(cache, part)
    check_data(cache, open_dataset(DATA))
    with pytest.raises(CacheMismatchError, match=rf"fingerprint a or {part.fingerprint()}\): \d+ of the cache's"):
        check_data(cache, other)


@pytest.mark.parametrize("name", ["projector.safetensors", "vision_tower.safetensors", "processor/tokenizer.json"])
def test_damage_beside_the_shards_is_an_error_before_training(tiny_cache, tmp_path, name):
    shutil.copytree(tiny_cache[0], tmp_path / "c")
    path = tmp_path / "c" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(CacheFormatError, match=rf"{name}: damaged: expected"):
        prepare(make_config(tmp_path / "c"))


def test_a_signal_that_is_not_cached_is_refused_naming_those_that_are(tmp_path):
    build_tiny_cache(tmp_path / "c", data="shapes:images=1,seed=5", signals=("logits",))
    cache = open_cache(tmp_path / "c")
    check_signals(cache, LossWeights(logits=1.0), phase="dft")
    with pytest.raises(CacheMismatchError, match=r"'visual_map'.*holds logits.*dft.losses.visual_map=0"):
        check_signals(cache, LossWeights(logits=1.0, visual_map=1.0), phase="dft")


def test_all_losses_without_a_signal_are_switched_off_by_one_remedy_and_need_no_student(tmp_path):
    build_tiny_cache(tmp_path / "c", data="shapes:images=1,seed=5", signals=("visual_columns",))
    cache = open_cache(tmp_path / "c")
    losses = {"dpt": {"losses": {"logits": 1.0}}, "dft": {"losses": {"logits": 1.0, "all_attention": 1.0}}}
    config = make_config(tmp_path / "c", phases=["dpt", "dft"], student="no/such/folder", **losses)
    with pytest.raises(CacheMismatchError) as caught:
        check_losses(config, {config.cache: cache})
    off = "dpt.losses.logits=0 dft.losses.logits=0 dft.losses.all_attention=0"
    assert f'SET="{off}" with make' in str(caught.value)
    for setting in off.split():
        assert f"--set {setting}" in str(caught.value)
    without = config_from_dict(TrainConfig, {**config_to_dict(config), "dpt": {}, "dft": {}})
    check_losses(without, {config.cache: cache})


def test_a_temperature_that_is_not_cached_is_refused_naming_those_that_are(tiny_cache):
    cache = open_cache(tiny_cache[0])
    check_signals(cache, LossWeights(logits=1.0, temperature=2.0), phase="dft")
    with pytest.raises(CacheMismatchError, match=r"temperature is 3.0.*1.0, 2.0 only"):
        check_signals(cache, LossWeights(logits=1.0, temperature=3.0), phase="dft")


def test_the_teacher_adapter_refuses_another_vision_tower(tiny_cache, tmp_path):
    prepared = prepare(make_config(tiny_cache[0], projector="taf"))
    student = prepared.student
    student.model.vision_tower.vision_tower.vision_model.post_layernorm.weight.data += 1
    student.save_pretrained(tmp_path / "student")
    assert load_student(tmp_path / "student").config.projector_type == "taf"
    with pytest.raises(CacheMismatchError, match=r"'taf'.*trained on another tower.*projector=ldpnetv2"):
        prepare(make_config(tiny_cache[0], student=str(tmp_path / "student")))


def test_a_student_folder_with_another_tokenizer_is_refused(tiny_cache, tmp_path):
    prepared = prepare(make_config(tiny_cache[0]))
    prepared.student.save_pretrained(tmp_path / "student")
    prepared.tokenizer.save_pretrained(tmp_path / "student")
    prepare(make_config(tiny_cache[0], student=str(tmp_path / "student")))
    path = tmp_path / "student" / "tokenizer.json"
    state = json.loads(path.read_text())
    vocabulary = state["model"]["vocab"]
    vocabulary["red"], vocabulary["blue"] = vocabulary["blue"], vocabulary["red"]
    path.write_text(json.dumps(state))
    with pytest.raises(CacheMismatchError, match="tokenizer of student"):
        prepare(make_config(tiny_cache[0], student=str(tmp_path / "student")))


def test_no_step_at_all_is_refused(tiny_cache):
    config = make_config(tiny_cache[0])
    with pytest.raises(ConfigError, match="no phase of dft has a step"):
        prepare(replace(config, dft=replace(config.dft, steps=0)))


def test_files_that_vanished_since_the_cache_was_built_are_named(tmp_path):
    import PIL.Image

    entries = []
    for name in ("a", "b"):
        PIL.Image.new("RGB", (72, 72), "red" if name == "a" else "blue").save(tmp_path / f"{name}.png")
        turns = [{"from": "human", "value": "<image>\nwhat color ?"}, {"from": "gpt", "value": "red"}]
        entries.append({"id": name, "image": f"{name}.png", "conversations": turns})
    (tmp_path / "data.json").write_text(json.dumps(entries))
    spec = str(tmp_path / "data.json")
    build_tiny_cache(tmp_path / "c", data=spec, signals=("logits",))
    prepare(make_config(tmp_path / "c", data=spec))
    (tmp_path / "b.png").unlink()
    with pytest.raises(CacheMismatchError, match=r"sample 'b' was readable.*Restore the file"):
        prepare(make_config(tmp_path / "c", data=spec))


def test_data_whose_place_is_not_known_must_be_named(tmp_path):
    (tmp_path / "data.json").write_text(
        json.dumps(
            [
                {
                    "id": "a",
                    "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "red"}],
                }
            ]
        )
    )
    build_tiny_cache(tmp_path / "c", data=str(tmp_path / "data.json"), signals=("logits",))
    with pytest.raises(ConfigError, match="pass --data"):
        prepare(make_config(tmp_path / "c", data=None))


def copy_with_plan(cache, target, **changes):
    """The same cache with another plan, sealed."""
    shutil.copytree(cache, target)
    plan = replace(read_plan(target), **changes)
    for name in ("plan.json", "manifest.json"):
        (target / name).unlink()
    write_plan(target, plan)
    seal(target)
    return target


@pytest.mark.parametrize(("store", "damage"), [("zarr", "missing"), ("zarr", "truncated"), ("webdataset", "truncated")])
@pytest.mark.slow(quick=1)
def test_a_lost_or_short_shard_file_is_found_before_the_first_step(tmp_path, store, damage):
    build_tiny_cache(tmp_path / "c", signals=("logits",), store=store)
    path = sorted(file for file in (tmp_path / "c" / "shards").rglob("*") if file.is_file() and "00003." in str(file))[
        -1
    ]
    content = path.read_bytes()
    path.unlink()
    if damage == "truncated":
        path.write_bytes(content[:-1])
    with pytest.raises(
        CacheFormatError, match=rf"{re.escape(str(path.relative_to(tmp_path / 'c')))}: .*`cachectl verify"
    ):
        prepare(make_config(tmp_path / "c", dft={"steps": 1}))  # no signal, so no record is read


def test_caches_whose_teachers_see_images_differently_meet_through_boxes(tiny_cache, tmp_path):
    plan = read_plan(tiny_cache[0])
    losses = {"steps": 1, "losses": {"answer_attention": 1.0, "visual_columns": 1.0}}
    phases = {"phases": ["dpt", "dft"], "dpt": losses}
    for name, change in (("other", {"layout": "pad"}), ("grid", {"grid": [9, 9]})):
        cache = copy_with_plan(tiny_cache[0], tmp_path / name, geometry={**plan.geometry, **change})
        prepared = prepare(make_config(tiny_cache[0], **phases, dft={**losses, "cache": str(cache)}))
        geometry = prepared.encoder.image_encoder.to_dict()
        assert geometry["layout"] == "square", "the student is built from the first cache's tower"
        assert geometry["grid"] == [3, 3]


def test_a_student_folder_with_another_image_processor_reads_pictures_its_own_way(tiny_cache, tmp_path):
    prepared = prepare(make_config(tiny_cache[0]))
    prepared.student.save_pretrained(tmp_path / "student")
    prepared.image_processor.save_pretrained(tmp_path / "student")
    same = prepare(make_config(tiny_cache[0], student=str(tmp_path / "student")))
    assert same.encoder.image_encoder.to_dict() == prepared.encoder.image_encoder.to_dict()
    path = tmp_path / "student" / "preprocessor_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, "image_mean": [0.1, 0.2, 0.3]}))
    losses = {"steps": 1, "losses": {"logits": 1.0, "answer_attention": 1.0, "visual_map": 1.0}}
    other = prepare(make_config(tiny_cache[0], student=str(tmp_path / "student"), dft=losses))
    assert other.encoder.image_encoder.to_dict()["processor"]["image_mean"] == [0.1, 0.2, 0.3]
    mine, cached = (run.phases[0].dataset.load(0).encoded.image_inputs["pixel_values"] for run in (other, same))
    assert abs(mine - cached).max() > 0.1


def test_attention_is_refused_where_nobody_knows_the_boxes_of_a_teachers_tokens(tiny_cache, tmp_path):
    geometry = {"kind": "library", "class": "NewProcessor", "processor": {}}
    cache = copy_with_plan(tiny_cache[0], tmp_path / "c", geometry=geometry)
    both = choose_terms(["logits", "answer_attention"])
    with pytest.raises(CacheMismatchError, match=r"answer_attention.*NewProcessor.*to 0 and distil logits"):
        check_geometry(open_cache(cache), {"kind": "dynamic"}, both, where="student X")
    check_geometry(open_cache(cache), {"kind": "dynamic"}, LOGITS, where="student X")
    with pytest.raises(CacheMismatchError, match=r"visual_columns.*visual token of student X sees"):
        check_geometry(open_cache(tiny_cache[0]), geometry, choose_terms(["visual_columns"]), where="student X")
    encoder = prepare(make_config(cache)).encoder.image_encoder
    assert encoder.to_dict()["layout"] == "pad", "MobileVLM's own way, where the cache's is of no use to it"


@pytest.mark.parametrize(("rows", "what"), [("image", "the whole image"), ("prefix", "the whole prompt")])
def test_maps_of_visual_rows_are_refused_where_these_see_what_follows_them(tiny_cache, rows, what, caplog):
    cache = open_cache(tiny_cache[0])
    check_visual_rows(cache, rows, choose_terms(["logits", "answer_attention"]), where="student X")
    check_visual_rows(cache, "causal", choose_terms(["visual_map", "visual_columns"]), where="student X")
    assert not caplog.records
    with pytest.raises(CacheMismatchError, match=rf"student X.*see {what}.*visual_map.*use answer_attention"):
        check_visual_rows(cache, rows, choose_terms(["visual_map"]), where="student X")
    check_visual_rows(cache, rows, choose_terms(["visual_columns"]), where="student X")
    assert f"student X see {what}, those of the teacher" in caplog.text


def test_a_tokenizer_with_more_words_than_the_student_has_rows_is_refused(tiny_cache):
    cache, tokenizer = open_cache(tiny_cache[0]), build_tokenizer()
    check_labels_fit(cache, tokenizer.vocab_size, tokenizer, where="student X")
    with pytest.raises(CacheMismatchError, match=rf"student X.*100 output rows.*{tokenizer.vocab_size} words"):
        check_labels_fit(cache, 100, tokenizer, where="student X")


def test_the_longest_sequence_is_the_caches_unless_it_is_given(tiny_cache, tmp_path):
    cache = copy_with_plan(tiny_cache[0], tmp_path / "c", extra={"max_length": 4096})
    assert prepare(make_config(cache)).encoder.max_length == 4096
    assert prepare(make_config(cache, max_length=300)).encoder.max_length == 300
    assert prepare(make_config(tiny_cache[0])).encoder.max_length == 2048


@pytest.mark.parametrize(
    ("part", "value", "words"),
    [
        ("geometry", {}, "geometry has no 'processor'"),
        ("geometry", {"processor": None}, "geometry has no 'processor'"),
        ("teacher", {}, "teacher.image_token_id is missing"),
        ("signals", {"logits": {}}, r"newer version.*signals\.logits: codec None is not known"),
        ("signals", {"logits": {"codec": "quantum"}}, r"newer version.*signals\.logits: codec 'quantum' is not known"),
        ("signals", {"logits": {"codec": "logits", "floor": 0.0, "min_k": 2, "max_k": 2}}, "temperatures"),
        (
            "signals",
            {"logits": {"codec": "visual_columns", "groups": 1, "exact": False}},
            "missing, which codec 'visual_columns' writes",
        ),
    ],
)
def test_a_plan_that_lacks_what_a_student_needs_is_refused_naming_it(tmp_path, part, value, words):
    build_tiny_cache(tmp_path / "c", data="shapes:images=1,seed=5", signals=("logits",))
    body = read_document(tmp_path / "c" / "plan.json")
    (tmp_path / "c" / "plan.json").write_bytes(document_bytes(body | {part: value}))
    (tmp_path / "c" / "manifest.json").unlink()
    seal(tmp_path / "c")  # as an attacker would sign it
    with pytest.raises(CacheFormatError, match=words):
        prepare(make_config(tmp_path / "c", data="shapes:images=1,seed=5"))
