"""Families that read videos: text, pixels, positions, logits and attention are those of the model library's eager pass.

Pixels are made by a slow reference here: the library's video processors need torchvision, which is no dependency.
"""

import json
import re
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import torch
import transformers as hf
from family_references import library_processor
from hypothesis import given, settings
from hypothesis import strategies as st
from image_array import ImageArray
from layout_cases import CASES
from tiny_families import LAYERS, save_tiny
from transformers.models.llava_next_video.modeling_llava_next_video import LlavaNextVideoPooler
from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize
from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize as smart_resize_all

from vlm_distill_cache.common.attention.tiles import box_array, span_array
from vlm_distill_cache.common.cache.schema import IGNORE_INDEX
from vlm_distill_cache.common.errors import ConfigError, SampleError
from vlm_distill_cache.data.families.models import open_family_settings
from vlm_distill_cache.data.families.table import FAMILIES
from vlm_distill_cache.data.images.encoder import VideoEncoder
from vlm_distill_cache.data.images.layouts import geometry_of, image_encoder_from_dict
from vlm_distill_cache.data.images.layouts.videos import PatchedFrames, in_words
from vlm_distill_cache.data.sample import Frame, FrameSampling, Sample, Turn
from vlm_distill_cache.data.text.collate import collate, join_image_inputs, joinable
from vlm_distill_cache.data.text.generation import generate_answers
from vlm_distill_cache.stage1_teacher.loop.signals import requests_of
from vlm_distill_cache.stage1_teacher.planning.plan import build_encoder
from vlm_distill_cache.stage1_teacher.teacher.teacher import Teacher
from vlm_distill_cache.stage2_student.students.library import LibraryStudent

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
PLAIN = {
    "image_mean": MEAN,
    "image_std": STD,
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "resample": 3,
}
PATCHES = {
    "patch_size": 4,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "size": {"shortest_edge": 512, "longest_edge": 8192},
}
SQUASHED = {"size": {"height": 24, "width": 24}}
SETTINGS = {
    "qwen2_vl": PATCHES,
    "qwen2_5_vl": PATCHES,
    "qwen3_vl": PATCHES,
    "llava_onevision": SQUASHED,
    "llava_next_video": {
        "size": {"shortest_edge": 24},
        "crop_size": {"height": 24, "width": 24},
        "do_center_crop": True,
    },
    "internvl": SQUASHED,
    "smolvlm": {"size": {"longest_edge": 72}, "max_image_size": {"longest_edge": 24}, "resample": 1},
}
VIDEO = {name: "<|video_pad|>" if name.startswith("qwen") else "<video>" for name in SETTINGS}
WIDTH, HEIGHT, COUNT = 40, 24, 8
ANSWER = "left."


@dataclass(frozen=True, eq=False)
class Clip:
    """Two frames a second of noise, or given ones."""

    arrays: np.ndarray
    name: str = "clip"

    def frames(self, sampling: FrameSampling | None = None):
        return [Frame(image=PIL.Image.fromarray(array), time=at / 2) for at, array in enumerate(self.arrays)]


def noise(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)


CLIPS = [Clip(noise(1, COUNT, HEIGHT, WIDTH)), Clip(noise(2, 5, HEIGHT, WIDTH))]
ALIKE = Clip(noise(2, COUNT, HEIGHT, WIDTH))
STILL = ImageArray(noise(3, 30, 40), "still")


@pytest.fixture(scope="module", params=list(SETTINGS))
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(family: str, tmp_path_factory) -> Path:
    saved = save_tiny(family, tmp_path_factory.mktemp(family))
    (saved / "video_preprocessor_config.json").write_text(json.dumps(PLAIN | SETTINGS[family]))
    return saved


@pytest.fixture(scope="module")
def teacher(folder: Path) -> Teacher:
    return Teacher(folder)


@pytest.fixture(scope="module")
def encoder(teacher: Teacher):
    video = teacher.family.video_token_id(teacher.config)
    made = build_encoder(teacher, template="auto", max_length=1024)
    return replace(made, most_pictures=None, sampling=FrameSampling(), video_token_id=video)


def clip_of(name: str, number: int) -> Clip:
    """Two videos, the second of five frames; one model takes videos of equally many alone in a batch."""
    return ALIKE if number and name == "llava_onevision" else CLIPS[number]


def conversation(name: str, number: int) -> Sample:
    """A picture and a video inside a question; a video in front of one; text alone."""
    texts = ("See  and  now", "What moves?", "Count.")
    images = ((STILL, clip_of(name, 0)), (clip_of(name, 1),), ())[number]
    turn = Turn(question=texts[number], answer=ANSWER, places=(4, 9) if number == 0 else ())
    return Sample(sample_id=f"s{number}", images=images, turns=(turn,))


def normalised(image: PIL.Image.Image) -> np.ndarray:
    """Pixels f4 ``[3, H, W]``."""
    return ((np.asarray(image) / 255 - MEAN) / STD).astype(np.float32).transpose(2, 0, 1)


def slow_patches(frames: list[np.ndarray]) -> np.ndarray:
    """Qwen-VL's rows, one for each patch: square by square of 2 x 2 patches, both frames of a patch in a row."""
    frames = [*frames, *frames[-1:] * (len(frames) % 2)]
    rows = []
    for first in range(0, len(frames), 2):
        for top in range(0, frames[0].shape[1], 8):
            for left in range(0, frames[0].shape[2], 8):
                for down, right in ((0, 0), (0, 4), (4, 0), (4, 4)):
                    y, x = top + down, left + right
                    cut = [frames[first + deep][:, y : y + 4, x : x + 4] for deep in (0, 1)]
                    rows.append(np.stack(cut, axis=1).reshape(-1))
    return np.stack(rows)


def slow_inputs(name: str, clip: Clip) -> dict[str, np.ndarray]:
    """A video's arrays by the documented rule of its family's video processor; scaling to whole tokens is none here."""
    images = [frame.image for frame in clip.frames()]
    if name.startswith("qwen"):
        count = (len(images) + 1) // 2
        made = {"pixel_values_videos": slow_patches([normalised(image) for image in images])}
        made["video_grid_thw"] = np.array([[count, HEIGHT // 4, WIDTH // 4]])
        return made | ({"second_per_grid_ts": np.array([2 / 2], np.float32)} if name == "qwen2_5_vl" else {})
    if name == "llava_next_video":
        images = [image.crop((8, 0, 32, 24)) for image in images]
    if name == "smolvlm":
        images = [image.resize((72, 44), PIL.Image.Resampling.LANCZOS) for image in images]
    kind = PIL.Image.Resampling.LANCZOS if name == "smolvlm" else PIL.Image.Resampling.BICUBIC
    pixels = np.stack([normalised(image.resize((24, 24), kind)) for image in images])
    return {"pixel_values": pixels} if name in ("internvl", "smolvlm") else {"pixel_values_videos": pixels[None]}


def video_text(name: str, folder: Path, count: int, inputs: dict[str, np.ndarray]) -> str:
    """What the library's processor writes for a video."""
    if name == "smolvlm":  # its own needs the package num2words
        shown = f"<fake_token_around_image><global-img>{'<image>' * 9}<fake_token_around_image>"
        words, last = ("eight", 3) if count == COUNT else ("five", 2)
        text = f"You are provided the following series of {words} frames from a 0:00:0{last} [H:MM:SS] video.\n"
        return text + "".join(f"\nFrame from 00:{int(at / 2):02d}:{shown}" for at in range(count)) + "\n\n"
    processor = library_processor(name, folder)
    processor.video_processor = SimpleNamespace(merge_size=2, temporal_patch_size=2)
    told = {key: torch.from_numpy(array) for key, array in inputs.items()}
    told["video_metadata"] = [SimpleNamespace(fps=2.0, frames_indices=list(range(count)))]
    if name == "internvl":
        told["pixel_values_videos"] = told["pixel_values"][None]
    return str(processor.replace_video_token(told, 0))


def reference(name: str, folder: Path, encoder, number: int) -> dict[str, torch.Tensor]:
    """The library's inputs for one conversation; a still picture is prepared as other tests show to be right."""
    tokenizer = encoder.tokenizer
    image, still = {"type": "image"}, encoder.image_encoder(STILL.load())
    texts = [{"type": "text", "text": text} for text in ("See ", " and ", " now", "What moves?", "Count.")]
    video = {"type": "video"}
    parts = ([texts[0], image, texts[1], video, texts[2]], [video, texts[3]], [texts[4]])[number]
    said = {"role": "assistant", "content": [{"type": "text", "text": ANSWER}]}
    text = tokenizer.apply_chat_template([{"role": "user", "content": parts}, said], tokenize=False)
    arrays: list[dict[str, np.ndarray]] = [dict(still.inputs)] if number == 0 else []
    shown = still.text or encoder.image_token * sum(tile.token_count for tile in still.tiles)
    text = text.replace(encoder.image_token, "\0")
    if number < 2:
        clip = clip_of(name, number)
        arrays.append(slow_inputs(name, clip))
        text = text.replace(VIDEO[name], video_text(name, folder, len(clip.arrays), arrays[-1]))
    text = text.replace("\0", shown)
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=not text.startswith("<s>"))["input_ids"]
    inputs = {"input_ids": ids}
    for key in {key for part in arrays for key in part}:
        inputs[key] = torch.from_numpy(np.concatenate([part[key] for part in arrays if key in part]))
    if name == "smolvlm" and arrays:
        inputs["pixel_values"] = inputs["pixel_values"][None]
    if name.startswith("qwen") and arrays:
        words = tokenizer.convert_tokens_to_ids(["<|image_pad|>", "<|video_pad|>"])
        inputs["mm_token_type_ids"] = (ids == words[0]).long() + 2 * (ids == words[1])
    return inputs


@pytest.fixture(scope="module")
def references(family: str, folder: Path, encoder):
    """Of each conversation the library's inputs, and logits and attention of its own pass over them."""
    model = hf.AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="eager").eval()
    found = []
    for number in range(3):
        inputs = reference(family, folder, encoder, number)
        with torch.no_grad():
            output = model(**inputs, use_cache=False, output_attentions=True)
        found.append((inputs, output.logits[0], [layer[0].mean(dim=0) for layer in output.attentions]))
    return found


def test_logits_and_attention_of_videos_pictures_and_text_in_one_batch_are_the_librarys(
    family: str, teacher: Teacher, encoder, references
):
    samples = [encoder(conversation(family, number)) for number in range(3)]
    batch = collate(samples, teacher.pad_token_id)
    wanted = dict.fromkeys(("logits", "answer_attention"))
    output = teacher.run(teacher.prepare(batch, requests_of(batch, wanted, tuple((layer,) for layer in range(LAYERS)))))
    done = 0
    for number, (sample, (inputs, logits, attention)) in enumerate(zip(samples, references, strict=True)):
        assert sample.input_ids.tolist() == inputs["input_ids"][0].tolist()
        for name, found in sample.image_inputs.items():
            np.testing.assert_allclose(found, inputs[name].numpy().reshape(found.shape), atol=1e-5)
        rows = sample.supervised_rows
        torch.testing.assert_close(output["logits"][done : done + len(rows)], logits[rows], atol=3e-4, rtol=1e-4)
        keys = np.flatnonzero(sample.visual_mask)
        for layer in range(LAYERS):
            found = output["answer_attention"][number, layer, : len(rows), : len(keys)]
            torch.testing.assert_close(found, attention[layer][rows][:, keys], atol=1e-5, rtol=1e-4)
        done += len(rows)


def test_generation_from_left_padded_prompts_with_videos_begins_with_the_librarys_logits(
    family: str, teacher: Teacher, encoder, references
):
    prompts = [encoder(conversation(family, number), prompt_only=True) for number in (0, 1)]
    inputs = partial(teacher.family.generation_inputs, teacher.config, dtype=torch.float32)
    made = generate_answers(teacher.model, encoder, prompts, max_new_tokens=2, inputs=inputs)
    for number in (0, 1):
        first = encoder(conversation(family, number)).supervised_rows[0]
        torch.testing.assert_close(made.first_logits[number], references[number][1][first], atol=3e-4, rtol=1e-4)


def test_a_student_trains_on_videos(family: str, teacher: Teacher, encoder, references):
    """Its logits are the teacher's, which has the same weights, and the loss reaches them through the frames' tokens."""
    student = LibraryStudent(teacher.model.requires_grad_(True), teacher.family)
    samples = [encoder(conversation(family, number)) for number in (1, 2)]
    batch = collate(samples, teacher.pad_token_id)
    logits = student(**student.model_inputs(batch), supervised=batch.labels != IGNORE_INDEX, use_cache=False).logits
    expected = [references[number][1][sample.supervised_rows] for number, sample in zip((1, 2), samples, strict=True)]
    torch.testing.assert_close(logits, torch.cat(expected), atol=3e-4, rtol=1e-4)
    path = teacher.family.projector
    weight = next(
        value for name, value in teacher.model.named_parameters() if name.startswith(path) and value.ndim == 2
    )
    (gradient,) = torch.autograd.grad(logits.square().sum(), weight)
    teacher.model.requires_grad_(False)
    assert gradient.abs().max() > 0


def token_brightness(name: str, encoder, encoded, config) -> np.ndarray:
    """How bright the pixels of each visual token are, f8 ``[N]``, the library's way from pixels to tokens."""
    if name.startswith("qwen"):
        return encoded.inputs["pixel_values_videos"].mean(axis=1).reshape(-1, 4).mean(axis=1)
    pixels = encoded.inputs.get("pixel_values_videos", encoded.inputs.get("pixel_values")).reshape(-1, 3, 24, 24)
    patch = {"llava_onevision": 8, "llava_next_video": 6}.get(name, 8)  # the last: 2 x 2 patches that one token merges
    side = 24 // patch
    patches = torch.from_numpy(pixels).mean(dim=1).reshape(-1, side, patch, side, patch).mean(dim=(2, 4)).flatten(1)
    if name == "llava_onevision":
        pooled = LlavaOnevisionModel.apply_pooling(SimpleNamespace(config=config), patches[..., None]).flatten()
        return np.append(pooled.numpy(), pooled.min())
    if name == "llava_next_video":
        return LlavaNextVideoPooler(config)(patches[..., None]).flatten().numpy()
    return patches.flatten().numpy()


def test_a_bright_square_in_the_third_frame_is_seen_by_the_token_whose_box_and_frames_hold_it(
    family: str, folder: Path, teacher: Teacher, encoder
):
    arrays = np.zeros((COUNT, HEIGHT, WIDTH, 3), np.uint8)
    arrays[2, 0:8, 24:32] = 255
    encoded = encoder.image_encoder.video(Clip(arrays).frames())
    brightness = token_brightness(family, encoder, encoded, teacher.config)
    boxes, spans = box_array(encoded.tiles), span_array(encoded.tiles)
    assert len(boxes) == len(brightness)
    best = int(brightness.argmax())
    assert brightness[best] > 1.2 * brightness.min() + 0.1
    (x0, y0, x1, y1), (first, end) = boxes[best], spans[best]
    assert (first, end) == ((2, 4) if family.startswith("qwen") else (2, 3))
    assert x0 <= 28 / WIDTH <= x1
    assert y0 <= 4 / HEIGHT <= y1
    assert all(tile.is_frame for tile in encoded.tiles)


def test_what_decides_a_videos_pixels_is_told_where_the_data_has_videos_and_rebuilds_it(family: str, encoder):
    images = encoder.image_encoder
    plain, whole = geometry_of(images, videos=False), geometry_of(images, videos=True)
    assert plain == images.to_dict() == replace(images, frames=None).to_dict()
    assert {key: value for key, value in whole.items() if key != "video"} == plain
    stored = json.loads(json.dumps(whole))
    again = image_encoder_from_dict(stored, images.processor)
    assert geometry_of(again, videos=True) == whole
    found, wanted = again.video(CLIPS[0].frames()), images.video(CLIPS[0].frames())
    assert found.tiles == wanted.tiles
    assert found.text == wanted.text
    for name, array in wanted.inputs.items():
        np.testing.assert_array_equal(found.inputs[name], array)


def test_settings_of_videos_that_cannot_be_used_leave_pictures_alone_and_are_told_with_a_video(
    family: str, folder: Path, encoder, tmp_path: Path
):
    for file in folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "video_preprocessor_config.json").unlink()
    (tmp_path / "video_preprocessor_config.json").write_text(json.dumps({"size": "large", "max_image_size": 3}))
    opened = open_family_settings(tmp_path).image_encoder
    assert opened.to_dict() == encoder.image_encoder.to_dict()
    broken = replace(encoder, image_encoder=opened)
    with pytest.raises(
        SampleError, match=r"how this model reads videos is not known: .*video_preprocessor_config\.json"
    ):
        broken(conversation(family, 1))


def test_a_word_for_a_video_that_is_no_token_is_refused_beside_a_video_alone(family: str, encoder):
    turn = Turn(question=f"What is {VIDEO[family]}?", answer=ANSWER)
    for images in ((), (CLIPS[0],)):
        sample = Sample(sample_id="s", images=images, turns=(turn,))
        if not images and VIDEO[family] not in encoder.tokenizer.get_added_vocab():
            assert VIDEO[family] in encoder.tokenizer.decode(encoder(sample).input_ids)
        else:
            with pytest.raises(SampleError, match=f"contains .{re.escape(VIDEO[family])}"):
                encoder(sample)


def test_families_without_videos_of_their_own_read_frames_as_pictures():
    assert {name for name, one in FAMILIES.items() if one.frames is not None} == set(SETTINGS)
    config = SimpleNamespace(video_token_id=7)
    with_token = {name for name, one in FAMILIES.items() if one.video_token_id(config) == 7}
    assert with_token == set(SETTINGS) - {"internvl", "smolvlm"}
    assert not any(isinstance(CASES[name], VideoEncoder) for name in ("square", "pad", "crop", "framed"))
    assert CASES["idefics3"].video_marker is CASES["llava-next"].video_marker is None


def test_pictures_and_videos_join_and_videos_of_other_lengths_go_apart():
    def sample(**shapes: tuple[int, ...]):
        return SimpleNamespace(image_inputs={name: np.zeros(shape, np.float32) for name, shape in shapes.items()})

    still, text = {"pixel_values": (2, 3, 4, 4)}, sample()
    long, short = ({"pixel_values_videos": (1, count, 3, 4, 4)} for count in (8, 5))
    samples = [sample(**still), sample(**short), sample(**long), sample(**still, **long), text, sample(**still)]
    groups = joinable(samples)
    places = {id(one): place for place, one in enumerate(samples)}
    assert [[places[id(one)] for one in group] for group in groups] == [[0, 1, 5], [2, 3, 4]]
    joined = [{name: tuple(tensor.shape) for name, tensor in join_image_inputs(group).items()} for group in groups]
    assert joined[0] == {"pixel_values": (4, 3, 4, 4), "pixel_values_videos": (1, 5, 3, 4, 4)}
    assert joined[1] == {"pixel_values": (2, 3, 4, 4), "pixel_values_videos": (2, 8, 3, 4, 4)}
    with pytest.raises(ConfigError, match="videos of one batch differ in frames or size"):
        join_image_inputs(samples)


def patched(times: str = "", **size: int) -> PatchedFrames:
    processor = hf.Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, temporal_patch_size=2)
    bounds = {"shortest_edge": 512, "longest_edge": 8192} | size
    return PatchedFrames.of(processor, {"size": bounds, "image_mean": MEAN, "image_std": STD}, times=times)


def test_an_odd_last_frame_fills_its_patch_up_and_its_span_holds_it_alone():
    clip = Clip(noise(5, 5, HEIGHT, WIDTH))
    made = patched("text")(clip.frames())
    np.testing.assert_allclose(
        made.inputs["pixel_values_videos"], slow_inputs("qwen3_vl", clip)["pixel_values_videos"], atol=1e-5
    )
    assert [tile.span for tile in made.tiles] == [(0.0, 2.0), (2.0, 4.0), (4.0, 5.0)]
    assert [part.split(" ")[0] for part in made.text.split("<|vision_end|>")[:-1]] == ["<0.2", "<1.2", "<2.0"]
    with pytest.raises(SampleError, match="its frames differ in size"):
        patched()([*clip.frames(), Frame(image=PIL.Image.new("RGB", (8, 8)), time=9.0)])


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 40), st.integers(4, 300), st.integers(4, 300), st.booleans())
def test_frames_are_scaled_as_the_library_scales_them(count, height, width, together):
    found = patched("text" if together else "")._sides(height, width, count)
    if together:
        expected = smart_resize_all(count, height, width, 2, 8, min_pixels=512, max_pixels=8192)
    else:
        expected = smart_resize(height, width, 8, min_pixels=512, max_pixels=8192)
    assert found == expected


def test_numbers_of_frames_are_written_in_words():
    words = {1: "one", 13: "thirteen", 20: "twenty", 32: "thirty-two", 64: "sixty-four", 100: "one hundred"}
    words |= {128: "one hundred and twenty-eight", 999: "nine hundred and ninety-nine", 1000: "1000"}
    assert {number: in_words(number) for number in words} == words
