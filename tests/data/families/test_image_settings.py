"""Every setting of sizes and pixels is read as the library's own image processor reads it, or refused by name."""

import copy
import json
from functools import cache
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import transformers as hf
from tiny_families import TINY, save_tiny, square
from transformers import AutoConfig

from vlm_distill_cache.common.errors import ConfigError, DistillError, ModelError
from vlm_distill_cache.common.models.original_llava import (
    is_original_llava,
    open_original_llava,
    original_image_processor,
)
from vlm_distill_cache.common.models.published import default_image_processor, is_published, load_published
from vlm_distill_cache.data.families.models import open_family_model
from vlm_distill_cache.data.families.table import family_of
from vlm_distill_cache.data.images.encoder import ImageEncoder
from vlm_distill_cache.data.text.processors import load_image_processor, load_tokenizer

PICTURES = [(64, 48), (30, 90), (24, 24), (7, 5), (100, 20)]
# What is put into preprocessor_config.json; None takes a key out.
SIZES = [
    {"size": None},
    {"size": 24},
    {"size": [24, 24]},
    {"size": square(24)},
    {"size": {"height": 24, "width": 48}},
    {"size": {"shortest_edge": 24}},
    {"size": {"longest_edge": 72}},
    {"size": {"shortest_edge": 24, "longest_edge": 48}},
    {"size": {"shortest_edge": 256, "longest_edge": 1024}},
    {"size": {"shortest_edge": 2048, "longest_edge": 1024}},
    {"size": {"max_height": 24, "max_width": 24}},
    {"size": {"min_pixels": 256, "max_pixels": 1024}},
    {"size": {"max_pixels": 1024, "min_pixels": 256, "longest_edge": 2048, "shortest_edge": 256}},
    {"size": {"height": 24}},
    {"size": {}},
    {"size": "24"},
    {"size": {"shortest_edge": "24"}},
    {"size": {"shortest_edge": -1}},
    {"size": {"height": 0, "width": 24}},
    {"min_pixels": 256, "max_pixels": 1024},
    {"min_pixels": 256},
    {"max_pixels": 1024, "size": None},
    {"min_pixels": 256, "max_pixels": 1024, "size": {"longest_edge": 512}},
    {"min_pixels": 2048, "max_pixels": 256},
    {"crop_size": 24},
    {"crop_size": None},
    {"crop_size": 16},
    {"crop_size": {"shortest_edge": 24}},
    {"size": {"shortest_edge": 24}, "crop_size": 24, "do_center_crop": True},
    {"size": {"shortest_edge": 24, "longest_edge": 48}, "crop_size": 24, "do_center_crop": True},
    {"size": {"max_height": 32, "max_width": 40}, "crop_size": 24, "do_center_crop": True},
    {"size": 32, "crop_size": 24, "do_center_crop": True},
    {"size": 24, "crop_size": 16, "do_center_crop": True, "default_to_square": True},
    {"do_pad": True, "pad_size": square(24)},
    {"do_pad": True, "pad_size": square(32)},
    {"do_resize": False},
    {"do_resize": False, "crop_size": 24, "do_center_crop": True},
    {"do_center_crop": True, "crop_size": None},
    {"max_image_size": None},
    {"max_image_size": {"longest_edge": 16}},
    {"max_image_size": {"longest_edge": 20}},
    {"max_image_size": 24},
    {"max_image_size": square(24)},
    {"max_image_size": {}},
    {"max_image_size": {"longest_edge": "24"}},
    {"do_image_splitting": False},
    {"do_pad": False},
    {"patch_size": [4, 4]},
    {"patch_size": 0},
    {"patch_size": 8},
    {"merge_size": None},
    {"merge_size": 1},
    {"temporal_patch_size": "2"},
    {"min_patches": 3, "max_patches": 2},
    {"max_patches": 1},
    {"max_patches": 0},
    {"image_grid_pinpoints": None},
    {"image_grid_pinpoints": [[24, 48]]},
    {"image_grid_pinpoints": [24, 48]},
    {"image_mean": 0.5, "image_std": 0.25},
    {"image_mean": [0.5], "image_std": [0.5, 0.5, 0.5]},
    {"image_mean": None},
    {"rescale_factor": None},
    {"resample": 0},
]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    return {name: save_tiny(name, tmp_path_factory.mktemp("tiny") / name) for name in TINY}


@cache
def parts_of(folder: Path):
    """Configuration, family and tokenizer of a checkpoint; its weights are not needed."""
    if is_original_llava(folder):
        config = open_original_llava(folder).config
    else:
        config = load_published(folder).config if is_published(folder) else AutoConfig.from_pretrained(folder)
    return config, family_of(config.model_type), load_tokenizer(folder)


def stored_settings(folder: Path) -> dict:
    path = folder / "preprocessor_config.json"
    if path.is_file():
        return json.loads(path.read_text())
    return default_image_processor(parts_of(folder)[0]).to_dict()


def with_settings(folder: Path, target: Path, changes: dict) -> Path:
    settings = stored_settings(folder)
    for key, value in changes.items():
        settings.pop(key, None) if value is None else settings.update({key: value})
    settings = {key: int(value) if key == "resample" else value for key, value in settings.items()}
    target.mkdir()
    (target / "preprocessor_config.json").write_text(json.dumps(settings))
    return target


def picture(width: int, height: int) -> PIL.Image.Image:
    return PIL.Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8))


def library_pixels(name: str, encoder, image: PIL.Image.Image) -> np.ndarray:
    """What the library's own code makes of a picture."""
    options = {"crop_to_patches": True} if name == "internvl" else {}
    if isinstance(encoder, ImageEncoder) and encoder.layout == "pad":
        settings = encoder.processor.to_dict()
        if isinstance(settings["image_mean"], float):  # which its padding does not know
            settings["image_mean"] = [settings["image_mean"]] * 3
        llava = hf.LlavaImageProcessorPil(**{**settings, "do_pad": True})
        return np.asarray(llava(image)["pixel_values"][0])[None]
    output = encoder.processor(image, **options)["pixel_values"]
    many = name in ("llava_next", "llava_onevision", "idefics3", "smolvlm")
    return np.asarray(output[0] if many else output, dtype=np.float32)


@pytest.mark.parametrize("name", TINY)
@pytest.mark.slow(quick=("qwen2_vl", "qwen3_vl", "paligemma2"))
def test_settings_are_read_as_the_library_reads_them_or_refused_by_name(name, checkpoints, tmp_path):
    config, family, tokenizer = parts_of(checkpoints[name])
    worked, refused = [], []
    for number, changes in enumerate(SIZES):
        folder = with_settings(checkpoints[name], tmp_path / str(number), changes)
        try:
            processor = load_image_processor(folder)
            if name == "llava_original":
                processor = original_image_processor({"image_aspect_ratio": "pad"}, processor)
            encoder = family.image_encoder(config, processor, tokenizer)
        except (ConfigError, ModelError) as error:
            refused.append(str(error))
            continue
        worked.append(changes)
        for size in PICTURES:
            image = picture(*size)
            encoded = encoder(image)
            np.testing.assert_array_equal(
                encoded.inputs["pixel_values"], library_pixels(name, encoder, image), err_msg=f"{changes} {size}"
            )
            counted = sum(tile.token_count for tile in encoded.tiles)
            if "image_grid_thw" in encoded.inputs:
                assert counted == encoded.inputs["image_grid_thw"].prod() // config.vision_config.spatial_merge_size**2
            elif name in ("idefics3", "smolvlm", "internvl"):
                assert counted == len(encoded.inputs["pixel_values"]) * encoder.least_token_count
            if len(encoded.tiles) > 100:
                break  # the seconds of such a picture show what the next one would
    assert len(worked) > 8, worked
    assert refused
    assert all("preprocessor_config.json" in reason for reason in refused), refused


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("qwen2_vl", {"size": {"min_pixels": 256, "max_pixels": 1024}}, r"shortest_edge of size .*got None"),
        ("qwen2_vl", {"size": {"longest_edge": 1024}}, r"preprocessor_config\.json.*shortest_edge of size"),
        ("qwen2_vl", {"size": {"shortest_edge": 256}}, r"longest_edge of size \(the most pixels\)"),
        ("qwen3_vl", {"patch_size": 8}, r"patch_size is 8, expected 4, which vision_config\.patch_size"),
        ("smolvlm", {"max_image_size": square(24)}, r"longest_edge of max_image_size: .*got None"),
        ("smolvlm", {"max_image_size": {"longest_edge": 12}}, r"which scale_factor=2 of config\.json does not divide"),
        ("internvl", {"size": {"shortest_edge": 24}}, "expected height and width of size"),
        ("llava_next", {"size": {"longest_edge": 24}, "crop_size": None}, "scaled to 0|got None"),
        ("llava_next", {"size": {"shortest_edge": 32}}, "size and crop_size must agree"),
        ("llava", {"size": {"shortest_edge": 24}}, "does not give a fixed size in layout"),
        ("gemma3", {"do_pan_and_scan": True}, "set do_pan_and_scan to false"),
        ("smolvlm", {"size": {"height": 100_000, "width": 100_000}}, "more than the 89478485 pixels allowed"),
    ],
)
def test_what_cannot_be_read_is_named(name, changes, said, checkpoints, tmp_path):
    config, family, tokenizer = parts_of(checkpoints[name])
    with pytest.raises(DistillError, match=said):
        family.image_encoder(
            config, load_image_processor(with_settings(checkpoints[name], tmp_path / "x", changes)), tokenizer
        )


@pytest.mark.filterwarnings("ignore:.*divide:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("name", ["qwen2_vl", "llava"])
def test_settings_by_which_pixels_become_no_numbers_are_refused(name, checkpoints, tmp_path):
    config, family, tokenizer = parts_of(checkpoints[name])
    folder = with_settings(checkpoints[name], tmp_path / "x", {"image_std": [0, 0, 0]})
    with pytest.raises(DistillError, match="pixels become no numbers"):
        family.image_encoder(config, load_image_processor(folder), tokenizer)


def test_limits_at_the_top_level_are_those_inside_size(checkpoints, tmp_path):
    config, family, tokenizer = parts_of(checkpoints["qwen2_vl"])
    dicts = []
    for number, changes in enumerate(
        ({"size": {"shortest_edge": 256, "longest_edge": 1024}}, {"size": None, "min_pixels": 256, "max_pixels": 1024})
    ):
        folder = with_settings(checkpoints["qwen2_vl"], tmp_path / str(number), changes)
        encoder = family.image_encoder(config, load_image_processor(folder), tokenizer)
        dicts.append(encoder.to_dict())
        assert (encoder.least_token_count, encoder.token_count) == (4, 16)
    assert dicts[0] == dicts[1]


CONFIGS = [
    ("llava", {"vision_config.patch_size": [8, 4]}, r"vision_config\.patch_size is \[8, 4\]"),
    ("llava", {"vision_config.image_size": None}, r"vision_config\.image_size is None"),
    ("llava", {"vision_config.patch_size": 0}, r"vision_config\.patch_size is 0"),
    ("llava", {"vision_config.patch_size": 25}, "expected at most vision_config.image_size"),
    ("llava", {"vision_feature_layer": -20}, "vision_feature_layer is -20, but the tower has"),
    ("llava", {"vision_feature_layer": [-1, 99]}, r"vision_feature_layer is \[-1, 99\]"),
    ("llava_next", {"vision_feature_layer": None}, "vision_feature_layer is None"),
    ("llava_next", {"image_grid_pinpoints": None}, r"image_grid_pinpoints differ .*\(None\)"),
    ("llava_next", {"image_grid_pinpoints": [24, 48]}, "or are no lists of"),
    ("llava_next", {"vision_config.image_size": 48}, r"tiles of 24 pixels .*reads 48"),
    ("llava_onevision", {"vision_aspect_ratio": "anyres_max_many"}, "vision_aspect_ratio is 'anyres_max_many'"),
    ("qwen2_5_vl", {"vision_config.spatial_merge_size": None}, r"vision_config\.spatial_merge_size is None"),
    ("idefics3", {"scale_factor": 0}, "scale_factor is 0"),
    ("idefics3", {"image_token_id": 10**6}, "image_token_id is 1000000, expected the id of one of the tokenizer's"),
    ("internvl", {"vision_config.image_size": [24, 48]}, r"image_size is \[24, 48\]"),
    ("internvl", {"downsample_ratio": 0.3}, "downsample_ratio=0.3 makes no whole number"),
    ("gemma3", {"mm_tokens_per_image": 10}, "mm_tokens_per_image=10 is no square"),
    ("gemma3", {"mm_tokens_per_image": 25}, "mm_tokens_per_image=25 is no square that 6 x 6 patches"),
    ("gemma3", {"boi_token_index": None}, "boi_token_index is None"),
    ("paligemma", {"vision_config.patch_size": [8, 8, 4]}, r"vision_config\.patch_size is"),
    ("compodistill", {"vision_config.image_size": "24"}, r"vision_config\.image_size is '24'"),
]


@pytest.mark.parametrize(("name", "changes", "said"), CONFIGS)
def test_configurations_are_refused_by_name(name, changes, said, checkpoints):
    config, family, tokenizer = parts_of(checkpoints[name])
    processor = load_image_processor(checkpoints[name]) if name != "compodistill" else None
    config = copy.deepcopy(config)
    for path, value in changes.items():
        *parts, key = path.split(".")
        holder = getattr(config, parts[0]) if parts else config
        vars(holder)[key] = value  # as the library's own checks might let it through
    with pytest.raises(ModelError, match=f"config.json.*{said}|{said}"):
        family.image_encoder(config, processor, tokenizer)


def test_pairs_of_equal_numbers_are_that_number(checkpoints):
    config, family, tokenizer = parts_of(checkpoints["paligemma"])
    processor = load_image_processor(checkpoints["paligemma"])
    expected = family.image_encoder(config, processor, tokenizer).to_dict()
    vars(config.vision_config).update(image_size=[24, 24], patch_size=(8, 8))
    assert family.image_encoder(config, processor, tokenizer).to_dict() == expected


def test_a_tower_whose_patches_pool_with_a_rest_leaves_the_rest_out_of_the_tile(checkpoints):
    """Gemma 3 pools 6 x 6 patches by twos to 3 x 3; of 7 x 7 the last row and column are seen by no token."""
    config, family, tokenizer = parts_of(checkpoints["gemma3"])
    vars(config.vision_config).update(image_size=28)
    encoder = family.image_encoder(config, hf.Gemma3ImageProcessorPil(size=square(28)), tokenizer)
    (tile,) = encoder(picture(40, 40)).tiles
    assert tile.region == pytest.approx((0, 0, 24 / 28, 24 / 28))


def test_a_checkpoint_with_such_a_size_is_refused_without_a_traceback(checkpoints, tmp_path):
    """Through the loader that both stages use."""
    import shutil

    folder = Path(shutil.copytree(checkpoints["qwen2_vl"], tmp_path / "teacher"))
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    settings["size"] = {"max_pixels": 1024, "min_pixels": 256, "longest_edge": 2048, "shortest_edge": 256}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError, match=r"preprocessor_config\.json.*min_pixels"):
        open_family_model(folder)
    settings["size"] = {"max_pixels": 1024, "min_pixels": 256}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match=r"teacher: preprocessor_config\.json.*shortest_edge of size"):
        open_family_model(folder)
