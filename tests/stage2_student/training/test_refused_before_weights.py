"""What configuration, tokenizer and data can tell is told before a weight of the student is made or read."""

import json

import pytest
from test_check_cache import make_config
from tiny_cache import DATA
from tiny_families import save_tiny
from transformers import LlavaForConditionalGeneration, PreTrainedModel

from vlm_distill_cache.common.errors import CacheMismatchError, ConfigError, DistillError, ModelError
from vlm_distill_cache.stage2_student.students import build
from vlm_distill_cache.stage2_student.training.preparation import prepare


@pytest.fixture(scope="module")
def folders(tiny_cache, tmp_path_factory):
    """Students on disk, by name: of our own class, with the teacher's projector, with another tokenizer, of the library."""
    found = {name: tmp_path_factory.mktemp(name) for name in ("own", "taf", "swapped")}
    for name, folder in found.items():
        prepared = prepare(make_config(tiny_cache[0], projector="taf" if name == "taf" else None))
        prepared.student.save_pretrained(folder)
        prepared.tokenizer.save_pretrained(folder)
        prepared.image_processor.save_pretrained(folder)
    path = found["swapped"] / "tokenizer.json"
    state = json.loads(path.read_text())
    vocabulary = state["model"]["vocab"]
    vocabulary["red"], vocabulary["blue"] = vocabulary["blue"], vocabulary["red"]
    path.write_text(json.dumps(state))
    found["library"] = save_tiny("llava", tmp_path_factory.mktemp("library") / "llava")
    found["few"] = save_tiny("llava", tmp_path_factory.mktemp("few") / "llava")
    model = LlavaForConditionalGeneration.from_pretrained(found["few"])
    model.resize_token_embeddings(20)
    model.save_pretrained(found["few"])
    return found


@pytest.fixture
def no_weights(folders, monkeypatch):
    """Whoever makes or reads weights from now on fails."""
    real = PreTrainedModel.from_pretrained.__func__

    def only_names(cls, *args, **options):
        if options.get("device_map") != "meta":
            pytest.fail("weights are read")
        return real(cls, *args, **options)

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(only_names))
    for name in ("initialize_by_fan_in", "load_frozen_parts", "fill_vision_tower", "fill_language_model"):
        monkeypatch.setattr(build, name, lambda *args, **options: pytest.fail("weights are made"))


LOGITS = {"steps": 1, "losses": {"logits": 1.0}}
LM = {"steps": 1, "losses": {"lm": 1.0}}


@pytest.mark.parametrize(
    ("student", "changes", "error", "message"),
    [
        ("swapped", {"dft": LOGITS}, CacheMismatchError, "tokenizer of student .*swapped"),
        ("library", {"dft": LOGITS}, CacheMismatchError, "tokenizer of student .*llava"),
        ("own", {"dft": LOGITS, "template": "vicuna_v1"}, CacheMismatchError, "prompt template 'vicuna_v1'"),
        ("mobilevlm", {"dft": LOGITS, "template": "vicuna_v1"}, CacheMismatchError, "prompt template 'vicuna_v1'"),
        ("own", {"dft": LM, "projector": "taf"}, ModelError, "its projector is 'ldpnetv2', asked for 'taf'"),
        ("library", {"dft": LM, "projector": "taf"}, ConfigError, "a model of the library with a projector of its own"),
        ("taf", {"dft": {**LM, "trainable": "tower"}}, ConfigError, r"has the teacher's projector \(TAF\)"),
        ("few", {"dft": LM}, DistillError, "its embedding has 20 rows|the student has 20 output rows"),
        ("own", {"dft": {**LM, "steps": 0}}, ConfigError, "no phase of dft has a step"),
        ("own", {"dft": LM, "data": "shapes:images=3,seed=99"}, CacheMismatchError, "is not the one"),
        ("own", {"dft": {**LM, "losses": {"lm": 1.0, "hidden": 1.0}}}, CacheMismatchError, "needs a signal"),
    ],
)  # fmt: skip
def test_nothing_is_loaded_for_a_run_that_cannot_be(tiny_cache, folders, no_weights, student, changes, error, message):
    config = make_config(tiny_cache[0], **{"student": str(folders.get(student, student)), "data": DATA, **changes})
    with pytest.raises(error, match=message):
        prepare(config)


@pytest.mark.parametrize("student", ["own", "taf", "library", "mobilevlm"])
def test_weights_are_loaded_for_a_run_that_can(tiny_cache, folders, no_weights, student):
    with pytest.raises(pytest.fail.Exception, match="weights are"):
        prepare(make_config(tiny_cache[0], student=str(folders.get(student, student)), data=DATA, dft=LM))
