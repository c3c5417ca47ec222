"""What a student's folder holds: files that its source had, a chat template and end tokens as trained."""

import json
import logging
import os
from dataclasses import replace

import pytest
import transformers as hf
from tiny_families import save_tiny
from tokenizers import Tokenizer

from vlm_distill_cache.data.families.models import open_family_model
from vlm_distill_cache.data.text.encoding import SampleEncoder, build_prompt
from vlm_distill_cache.data.text.templates import get_template
from vlm_distill_cache.stage2_student.exports.folder import keep_files, save_student_folder
from vlm_distill_cache.stage2_student.students.library import LibraryStudent, open_library_student


def save(found, target, *, source, template=None, tokenizer=None):
    tokenizer = tokenizer or found.tokenizer
    encoder = SampleEncoder(
        tokenizer=tokenizer,
        image_encoder=found.image_encoder,
        template=get_template(template or found.family.template, tokenizer),
        image_token_id=found.family.image_token_id(found.model.config),
        max_length=1000,
    )
    target.mkdir()
    student = LibraryStudent(found.model, found.family)
    save_student_folder(target, model=student, encoder=encoder, image_processor=found.processor, source=source)
    return encoder


def test_only_known_plain_files_of_a_bounded_size_are_kept(tmp_path, caplog):
    source, blobs, target = (tmp_path / name for name in ("snapshot", "blobs", "target"))
    for folder in (source, blobs, target):
        folder.mkdir()
    settings = {"processor_class": "LlavaProcessor", "patch_size": 7, "auto_map": {"AutoProcessor": "evil.Processor"}}
    (blobs / "a1").write_text(json.dumps(settings))
    (source / "processor_config.json").symlink_to("../blobs/a1")  # as in the hub's cache
    (source / "special_tokens_map.json").write_text('{"eos_token": "</s>"}')
    (source / "added_tokens.json").write_text("[1]")
    (source / "generation_config.json").write_text("{")
    (source / "evil.py").write_text("raise SystemExit")
    (source / "optimizer.bin").write_bytes(b"1")
    os.mkfifo(source / "vocab.txt")
    (source / "merges.txt").mkdir()
    (source / "video_preprocessor_config.json").symlink_to("gone")
    with (source / "tokenizer.model").open("wb") as file:
        file.truncate(1 << 30)
    (source / "vocab.json").write_text("{}")
    (target / "vocab.json").write_text("[]")
    keep_files(source, target)
    assert {path.name for path in target.iterdir()} == {
        "processor_config.json",
        "special_tokens_map.json",
        "vocab.json",
    }
    assert json.loads((target / "processor_config.json").read_text()) == {
        "processor_class": "LlavaProcessor",
        "patch_size": 7,
    }
    assert (target / "vocab.json").read_text() == "[]"  # what was saved anew stays
    said = [
        name
        for name in ("added_tokens", "generation_config", "vocab.txt", "merges", "tokenizer.model")
        if name in caplog.text
    ]
    assert len(said) == 5


def test_a_source_keeps_its_files_and_two_savings_are_equal_byte_for_byte(tmp_path, caplog):
    source = save_tiny("llava", tmp_path / "source")
    video, processor = {"size": {"height": 9, "width": 9}}, {"processor_class": "LlavaProcessor", "patch_size": 8}
    (source / "video_preprocessor_config.json").write_text(json.dumps(video))
    (source / "processor_config.json").write_text(json.dumps({**processor, "num_additional_image_tokens": 1}))
    # A temperature without sampling, as some publish: the library would not save it.
    (source / "generation_config.json").write_text('{"temperature": 0.9, "eos_token_id": [2, 9], "max_length": 77}')
    for name in ("one", "two"):
        save(open_family_model(source), tmp_path / name, source=source)
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert one == two
    assert json.loads(one["video_preprocessor_config.json"]) == video
    kept = json.loads(one["processor_config.json"])
    assert kept.items() >= {**processor, "vision_feature_select_strategy": "default"}.items()
    made = json.loads(one["generation_config.json"])
    assert (made["temperature"], made["eos_token_id"], made["max_length"]) == (0.9, [2, 9], 77)
    assert "reads a question otherwise" not in caplog.text
    open_library_student(tmp_path / "one")


def test_another_template_than_the_checkpoints_is_the_one_that_is_written_and_ends_answers(tmp_path):
    source = save_tiny("llava_next", tmp_path / "source")
    encoder = save(open_family_model(source), tmp_path / "final", source=source, template="plain")
    asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "left out"}]}]
    processor = hf.AutoProcessor.from_pretrained(tmp_path / "final")
    assert processor.apply_chat_template(asked, add_generation_prompt=True) == "<image>"
    ends = json.loads((tmp_path / "final" / "generation_config.json").read_text())["eos_token_id"]
    assert set(encoder.end_token_ids) <= set(ends)
    assert encoder.tokenizer.convert_tokens_to_ids("\u010a") in ends  # the line feed behind a caption


@pytest.mark.parametrize(
    "settings", [{"patch_size": 1e-9}, {"num_additional_image_tokens": 10**12}, {"patch_size": True}]
)
def test_counts_that_no_model_has_are_not_kept(tmp_path, caplog, settings):
    (tmp_path / "target").mkdir()
    (tmp_path / "processor_config.json").write_text(json.dumps({"processor_class": "LlavaProcessor", **settings}))
    keep_files(tmp_path, tmp_path / "target")
    assert not list((tmp_path / "target").iterdir())
    assert f"{next(iter(settings))}" in caplog.text
    assert "left out" in caplog.text


def test_a_processor_that_reads_otherwise_is_told_in_a_line(tmp_path, caplog):
    source = save_tiny("llava", tmp_path / "source")
    (source / "processor_config.json").write_text('{"processor_class": "LlavaProcessor", "patch_size": 4}')
    save(open_family_model(source), tmp_path / "final", source=source)
    assert "the library's processor reads a question otherwise than this student was trained to" in caplog.text


def test_a_family_whose_processor_needs_torchvision_is_saved_and_told_as_information(tmp_path, caplog):
    source = save_tiny("qwen2_vl", tmp_path / "source")
    with caplog.at_level(logging.INFO):
        save(open_family_model(source), tmp_path / "final", source=source)
    assert (
        json.loads((tmp_path / "final" / "processor_config.json").read_text())["processor_class"] == "Qwen2VLProcessor"
    )
    assert not [one for one in caplog.records if one.levelno >= logging.WARNING and one.name.startswith("vlm_distill")]


@pytest.mark.parametrize("name", ["llava", "mobilevlm_v2"])
def test_special_tokens_are_stored_as_they_were_read_in_training(tmp_path, name):
    """Some checkpoints say of theirs that they are normalised, and then do not find them."""
    found = open_family_model(save_tiny(name, tmp_path / "source"))
    described = json.loads(found.tokenizer.backend_tokenizer.to_str())
    described["normalizer"] = {"type": "Prepend", "prepend": "\u2581"}
    for token in described["added_tokens"]:
        token["normalized"] = True
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(described)), bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        unk_token="<unk>",
    )  # fmt: skip
    found = found._replace(tokenizer=tokenizer)
    target = tmp_path / "final"
    if name == "llava":
        encoder = save(found, target, source=None)
    else:
        target.mkdir()
        encoder = SampleEncoder(
            tokenizer=tokenizer, image_encoder=found.image_encoder, template=get_template("short"),
            image_token_id=found.model.config.image_token_id, max_length=1000,
        )  # fmt: skip
        save_student_folder(target, model=found.model, encoder=encoder, image_processor=found.processor, source=None)
    assert encoder.reader is not tokenizer
    stored = hf.AutoTokenizer.from_pretrained(target)
    text = "USER: hi ASSISTANT: yes.</s>USER: and ASSISTANT:"
    ids = stored(text, add_special_tokens=False)["input_ids"]
    assert ids.count(stored.eos_token_id) == 1
    assert ids == encoder.reader(text, add_special_tokens=False)["input_ids"]
    again = replace(encoder, tokenizer=stored)
    assert again.reader is stored
    assert build_prompt(again, None, "hi").input_ids.tolist() == build_prompt(encoder, None, "hi").input_ids.tolist()
