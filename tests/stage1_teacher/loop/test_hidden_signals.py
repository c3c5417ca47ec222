"""Hidden states, projector output and visual logits in a cache equal those of the library's own forward pass."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LlavaForConditionalGeneration

from vlm_distill_cache.common.cache.schema import IGNORE_INDEX
from vlm_distill_cache.common.cache.stores import open_reader
from vlm_distill_cache.common.codecs.checks import value_damage
from vlm_distill_cache.common.codecs.live import as_tensors
from vlm_distill_cache.common.codecs.registry import codec_from_dict
from vlm_distill_cache.common.errors import CacheFormatError, ConfigError
from vlm_distill_cache.common.opening import open_cache
from vlm_distill_cache.common.tools.verify import verify
from vlm_distill_cache.data.registry import open_dataset
from vlm_distill_cache.data.text.collate import collate
from vlm_distill_cache.stage1_teacher.planning.plan import build_encoder
from vlm_distill_cache.stage1_teacher.teacher.teacher import Teacher

SIGNALS = ("hidden", "visual_hidden", "projector_output", "visual_logits")
OPTIONS = {"signals": SIGNALS, "hidden_layers": (0, 2, -1), "hidden_dtype": "f4", "logits": "exact"}
SHARED = {"visual_hidden", "projector_output", "visual_entry_count", "visual_token_ids"}


def write_data(folder: Path) -> Path:
    """Two conversations about one picture, one about another, one without any."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for index, image in enumerate(("a.png", "a.png", "b.png", None)):
        question = "what color is the circle ?" if index % 2 else "is there a square ?"
        turns = [
            {"from": "human", "value": question},
            {"from": "gpt", "value": "red" if index % 2 else "yes , there is"},
        ]
        entry = {"id": f"s{index}", "conversations": turns}
        if image:
            pixels = np.random.default_rng(ord(image[0])).integers(0, 256, (30, 40, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(folder / image)
            entry["image"], turns[0]["value"] = image, "<image>\n" + question
        entries.append(entry)
    path = folder / "data.json"
    path.write_text(json.dumps(entries))
    return path


@pytest.fixture(scope="module")
def teacher(tiny_llava) -> Teacher:
    return Teacher(tiny_llava)


def read_all(path: Path) -> dict[str, dict[str, object]]:
    cache = open_cache(path)
    codecs = {name: codec_from_dict(settings) for name, settings in cache.plan.signals.items()}
    return {
        name: {signal: as_tensors(codec.decode(cache.read(name))) for signal, codec in codecs.items()}
        for name in cache.sample_ids
    }


@pytest.mark.parametrize("store", ["zarr", "webdataset"])
def test_cached_states_are_the_librarys_own(store: str, build_cache, tmp_path: Path, teacher: Teacher):
    data = write_data(tmp_path)
    build_cache(tmp_path / "cache", data=str(data), store=store, limit=0, **OPTIONS)
    assert verify(tmp_path / "cache", deep=True) == []
    found, dataset = read_all(tmp_path / "cache"), open_dataset(str(data), split="train")
    encoder = build_encoder(teacher, template="short", max_length=512)
    assert isinstance(teacher.model, LlavaForConditionalGeneration)
    for position, name in enumerate(dataset.sample_ids):
        batch = collate([encoder(dataset[position])], teacher.pad_token_id)
        with torch.inference_mode():
            output = teacher.model(**batch.model_inputs(), output_hidden_states=True)
        states = torch.stack([output.hidden_states[layer] for layer in (0, 2, -1)], dim=2)[0]  # [T, S, D]
        supervised, visual = (batch.labels != IGNORE_INDEX)[0], batch.visual_mask[0]
        torch.testing.assert_close(found[name]["hidden"], states[supervised], atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(found[name]["visual_hidden"], states[visual], atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(found[name]["projector_output"][:, 0], states[visual][:, 0], atol=2e-5, rtol=1e-4)
        sparse = found[name]["visual_logits"]
        assert len(sparse) == int(visual.sum())
        if len(sparse):
            features = teacher.model.get_image_features(pixel_values=batch.image_inputs["pixel_values"]).pooler_output[
                0
            ]
            torch.testing.assert_close(found[name]["projector_output"][:, 0], features, atol=2e-5, rtol=1e-4)
            dense = output.logits[0][visual].float().log_softmax(-1)
            torch.testing.assert_close(
                sparse.log_probs[sparse.entry_mask],
                dense.gather(1, sparse.token_ids)[sparse.entry_mask],
                atol=1e-4,
                rtol=1e-4,
            )
            assert torch.equal(sparse.token_ids[:, 0], dense.argmax(1))


def test_what_depends_on_the_image_alone_is_stored_once(build_cache, tmp_path: Path):
    build_cache(tmp_path / "cache", data=str(write_data(tmp_path)), limit=0, **OPTIONS)
    cache = open_cache(tmp_path / "cache")
    reader = open_reader("zarr", tmp_path / "cache", 0, cache.plan.all_fields)
    first, second = cache.read("s0"), cache.read("s1")
    for name in SHARED:
        np.testing.assert_array_equal(first[name], second[name])
    assert int(second["visual_source"][0]) == 0
    assert [len(reader.read(position)["visual_hidden"]) for position in range(2)] == [
        len(first["visual_hidden"]),
        0,
    ]
    reader.close()


def test_float16_states_are_within_its_rounding(build_cache, tmp_path: Path):
    data = str(write_data(tmp_path))
    build_cache(tmp_path / "exact", data=data, limit=0, **OPTIONS)
    build_cache(tmp_path / "half", data=data, limit=0, **{**OPTIONS, "hidden_dtype": "f2"})
    exact, half = read_all(tmp_path / "exact"), read_all(tmp_path / "half")
    for name, signals in exact.items():
        for signal in ("hidden", "visual_hidden", "projector_output"):
            torch.testing.assert_close(half[name][signal], signals[signal], atol=1e-6, rtol=2**-11)


@pytest.mark.parametrize("layers", [(9,), (-6,)])
def test_layers_that_the_teacher_lacks_are_refused(layers, build_cache, tmp_path: Path):
    with pytest.raises(ConfigError, match="the teacher has 4 layers"):
        build_cache(tmp_path / "cache", **{**OPTIONS, "hidden_layers": layers})


def test_the_same_layer_twice_is_refused(build_cache, tmp_path: Path):
    with pytest.raises(ConfigError, match="distinct layers"):
        build_cache(tmp_path / "cache", **{**OPTIONS, "hidden_layers": (4, -1)})


def test_verify_finds_visual_logits_that_no_codec_writes(build_cache, tmp_path: Path):
    build_cache(tmp_path / "cache", data=str(write_data(tmp_path)), limit=0, **OPTIONS)
    cache = open_cache(tmp_path / "cache")
    record = cache.read("s0")
    assert list(value_damage(record, cache.plan)) == []
    ids = record["visual_token_ids"].copy()
    ids[1] = ids[0]
    assert any(
        "visual_token_ids of a row repeat" in line
        for line in value_damage(record | {"visual_token_ids": ids}, cache.plan)
    )
    short = record | {"visual_hidden": record["visual_hidden"][:-1]}
    assert any("visual_hidden has" in line for line in value_damage(short, cache.plan))
    with pytest.raises(CacheFormatError, match="cachectl verify"):
        as_tensors(codec_from_dict(cache.plan.signals["hidden"]).decode({"hidden": record["hidden"][:, :1]}))
