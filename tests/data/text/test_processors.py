"""Loading a folder's tokenizer and image processor: every stored form, one class, clear errors."""

import json

import pytest
from PIL import Image

from vlm_distill_cache.common.errors import ModelError
from vlm_distill_cache.data import builtin
from vlm_distill_cache.data.text.processors import load_image_processor, load_tokenizer

# As LLaVA-1.5 checkpoints have it on disk.
LLAVA = {
    "crop_size": {"height": 336, "width": 336}, "do_center_crop": True, "do_convert_rgb": True,
    "do_normalize": True, "do_rescale": True, "do_resize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
    "image_processor_type": "CLIPImageProcessor", "processor_class": "LlavaProcessor", "resample": 3,
    "rescale_factor": 0.00392156862745098, "size": {"shortest_edge": 336},
}  # fmt: skip


def write_json(path, content):
    path.write_text(json.dumps(content))
    return path.parent


def test_the_shipped_folder_loads_as_what_wrote_it():
    folder = builtin.processor_directory()
    assert load_image_processor(folder).to_dict() == builtin.load_image_processor().to_dict()
    assert load_tokenizer(folder).get_vocab() == builtin.load_tokenizer().get_vocab()


@pytest.mark.parametrize("name", ["CLIPImageProcessor", "CLIPImageProcessorFast", "CLIPImageProcessorPil"])
@pytest.mark.parametrize("nested", [False, True])
def test_every_stored_class_name_in_either_file_gives_the_pil_class(tmp_path, name, nested):
    stored = LLAVA | {"image_processor_type": name}
    if nested:
        write_json(
            tmp_path / "processor_config.json",
            {"image_processor": stored, "processor_class": "LlavaProcessor"},
        )
    else:
        write_json(tmp_path / "preprocessor_config.json", stored)
        write_json(tmp_path / "processor_config.json", {"processor_class": "LlavaProcessor", "patch_size": 14})
    processor = load_image_processor(tmp_path)
    assert type(processor).__name__ == "CLIPImageProcessorPil"
    assert processor.to_dict()["size"]["shortest_edge"] == 336
    assert processor(Image.new("RGB", (40, 30)))["pixel_values"][0].shape == (3, 336, 336)


def test_the_class_name_of_old_checkpoints_is_understood(tmp_path):
    stored = {key: value for key, value in LLAVA.items() if key != "image_processor_type"}
    write_json(tmp_path / "preprocessor_config.json", stored | {"feature_extractor_type": "CLIPFeatureExtractor"})
    assert type(load_image_processor(tmp_path)).__name__ == "CLIPImageProcessorPil"


@pytest.mark.parametrize("name", ["NoSuchImageProcessor", "CLIPModel", None])
def test_a_class_that_the_library_does_not_have_is_named(tmp_path, name):
    write_json(tmp_path / "preprocessor_config.json", LLAVA | {"image_processor_type": name})
    with pytest.raises(ModelError, match=f"image_processor_type is '{name}'.* expected for example"):
        load_image_processor(tmp_path)


def test_a_folder_without_the_files_or_with_damaged_ones_says_what_is_expected(tmp_path):
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(ModelError, match=r"expected preprocessor_config\.json"):
            load_image_processor(folder)
        with pytest.raises(ModelError, match=r"expected tokenizer\.json, tokenizer\.model, or vocab\.json") as told:
            load_tokenizer(folder)
        assert "\n" not in str(told.value)
        assert "tiktoken" not in str(told.value)
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(ModelError, match=r"expected preprocessor_config\.json"):
        load_image_processor(tmp_path)


@pytest.mark.parametrize("damage", ["{}", '{"model": {"type": "BPE"}}', "[]", "{", "\x00"])
def test_a_damaged_tokenizer_is_a_clear_error(tmp_path, damage):
    builtin.load_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(damage)
    with pytest.raises(ModelError, match=r"no usable tokenizer.*expected tokenizer\.json"):
        load_tokenizer(tmp_path)
