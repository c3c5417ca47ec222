"""Pixels as bytes are the image processor's own numbers, bit for bit, or they are not held as bytes."""

from dataclasses import replace

import numpy as np
import PIL.Image
import pytest
import transformers
from layout_cases import CASES, square

from vlm_distill_cache.data.images.byte_pixels import (
    BytePixels,
    ImageInputs,
    as_bytes,
    joined,
    joined_as_held,
    pixel_tables,
)
from vlm_distill_cache.data.images.encoder import ImageEncoder
from vlm_distill_cache.data.images.layouts.videos import FixedFrames, PatchedFrames, SquaredFrames
from vlm_distill_cache.data.sample import Frame

SIZES = ((64, 64), (90, 40), (37, 80))


def picture(width, height, seed=0):
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return PIL.Image.fromarray(noise)


def bits(array):
    return np.ascontiguousarray(array).view(np.uint32)


@pytest.mark.parametrize("name", CASES)
def test_every_familys_pixels_are_bytes_of_its_table(name):
    encoder = CASES[name]
    tables = pixel_tables(encoder)
    for number, size in enumerate(SIZES):
        numbers = encoder(picture(*size, seed=number)).inputs["pixel_values"]
        held = as_bytes(numbers, tables)
        assert held is not None
        assert held.data.nbytes * 4 == numbers.nbytes
        assert np.array_equal(bits(held.numbers()), bits(numbers))


def _video_encoders():
    other = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.9, 0.8, 0.7]}  # than of pictures
    plain = transformers.CLIPImageProcessorPil(size=square(24), do_center_crop=False, **other)
    images = ImageEncoder.from_processor(plain, (3, 3))
    return {
        "fixed": replace(CASES["onevision"], frames=FixedFrames(images=images, newline=True)),
        "squared": replace(CASES["smolvlm"], frames=SquaredFrames.of(CASES["smolvlm"].processor, other)),
        "patched": replace(CASES["qwen"], frames=PatchedFrames.of(CASES["qwen"].processor, other)),
    }


@pytest.mark.parametrize("name", ["fixed", "squared", "patched"])
def test_frames_of_a_video_are_bytes_of_a_table_of_their_own(name):
    encoder = _video_encoders()[name]
    frames = [Frame(image=picture(60, 44, seed=number), time=float(number)) for number in range(3)]
    inputs = encoder.video(frames).inputs
    numbers = next(array for key, array in inputs.items() if key.startswith("pixel_values"))
    held = as_bytes(numbers, pixel_tables(encoder))
    assert held is not None
    assert len(pixel_tables(encoder)) == 2
    assert np.array_equal(bits(held.numbers()), bits(numbers))


@pytest.mark.parametrize(
    "steps", [{"do_rescale": False}, {"do_normalize": False}, {"do_rescale": False, "do_normalize": False}]
)
def test_steps_that_a_processor_leaves_out_are_left_out_of_its_table(steps):
    encoder = ImageEncoder.from_processor(
        transformers.CLIPImageProcessorPil(size=square(32), do_center_crop=False, **steps), (8, 8)
    )
    numbers = encoder(picture(64, 48)).inputs["pixel_values"]
    held = as_bytes(numbers, pixel_tables(encoder))
    assert held is not None
    assert np.array_equal(bits(held.numbers()), bits(numbers))


def test_numbers_that_no_byte_makes_stay_as_they_are():
    encoder = CASES["square"]
    numbers = encoder(picture(64, 64)).inputs["pixel_values"]
    tables = pixel_tables(encoder)
    for value in (0.0, np.nan, np.inf, 1e30, np.nextafter(numbers[0, 1, 5, 7], np.float32(9))):
        other = numbers.copy()
        other[0, 1, 5, 7] = value
        assert as_bytes(other, tables) is None
    assert as_bytes(np.zeros((1, 3, 4, 4), np.float32), ()) is None
    for other in (numbers.astype(np.float64), numbers[:0], numbers[:, :2], np.zeros((4, 5), np.float32)):
        assert as_bytes(other, tables) is None
    zeros = -np.zeros((1, 3, 2, 2), np.float32)  # equal to zero, but for its bits
    assert as_bytes(zeros, [np.tile(np.arange(256, dtype=np.float32), (3, 1))]) is None


def test_inputs_give_numbers_whatever_they_hold():
    numbers = CASES["square"](picture(64, 64)).inputs["pixel_values"]
    held = as_bytes(numbers, pixel_tables(CASES["square"]))
    inputs = ImageInputs({"pixel_values": held, "image_sizes": np.array([[64, 64]])})
    assert list(inputs) == ["pixel_values", "image_sizes"]
    assert np.array_equal(inputs["pixel_values"], numbers)
    assert inputs["image_sizes"].tolist() == [[64, 64]]


@pytest.mark.parametrize("name", ["square", "llava-next", "qwen"])
def test_joined_pictures_are_their_numbers_joined(name):
    encoder = CASES[name]
    numbers = [encoder(picture(*size)).inputs["pixel_values"] for size in SIZES]
    held = [as_bytes(array, pixel_tables(encoder)) for array in numbers]
    expected = np.concatenate(numbers)
    assert np.array_equal(joined(held), expected)
    assert np.array_equal(joined([held[0], *numbers[1:]]), expected)
    together = joined_as_held(held)
    assert isinstance(together, BytePixels)
    assert np.array_equal(together.numbers(), expected)
    other = BytePixels(data=held[1].data, table=held[1].table + 1, shape=held[1].shape)
    assert np.array_equal(joined_as_held([held[0], other]), np.concatenate([numbers[0], numbers[1] + 1]))
