"""Every kind of image file gives upright RGB, and every damaged one a `SampleError` that names it."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest

from vlm_distill_cache.common.errors import SampleError
from vlm_distill_cache.common.pixels import decode_image, image_hash, to_rgb
from vlm_distill_cache.data.images.load import FileSlice, ImageBytes, ImageFile


def encode(image, fmt="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, fmt, **options)
    return buffer.getvalue()


def pixels(data):
    image = decode_image(data, name="x")
    assert image.mode == "RGB"
    return np.asarray(image)


RAMP = np.arange(12 * 10, dtype=np.uint8).reshape(12, 10)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_turns_the_picture_upright(orientation):
    upright = np.zeros((20, 30, 3), dtype=np.uint8)
    upright[:10, :15] = 255  # the top left corner is bright
    undo = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }[orientation]
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    stored = PIL.Image.fromarray(np.ascontiguousarray(undo(upright)))
    np.testing.assert_array_equal(pixels(encode(stored, exif=exif)), upright)


def test_cmyk_jpeg_becomes_its_colour():
    cmyk = PIL.Image.new("CMYK", (16, 16), (0, 255, 255, 0))  # magenta + yellow = red
    red, green, blue = pixels(encode(cmyk, "JPEG", quality=95))[8, 8]
    assert red > 200
    assert max(green, blue) < 60


def test_palette_with_and_without_transparency():
    indexed = PIL.Image.fromarray(RAMP)  # 120 indices into a palette of (255 - i, i, 7)
    indexed.putpalette([value for index in range(256) for value in (255 - index, index, 7)])
    assert indexed.mode == "P"
    expected = np.stack([255 - RAMP, RAMP, np.full_like(RAMP, 7)], axis=2)
    np.testing.assert_array_equal(pixels(encode(indexed)), expected)
    clear = PIL.Image.new("P", (4, 4), 0)
    clear.putpalette([10, 20, 30] + [0] * 765)
    assert (pixels(encode(clear, transparency=0)) == 255).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_is_laid_over_white(mode):
    clear = PIL.Image.new("RGBA", (4, 4), (0, 0, 0, 0)).convert(mode)
    half = PIL.Image.new("RGBA", (4, 4), (0, 0, 0, 128)).convert(mode)
    opaque = PIL.Image.new("RGBA", (4, 4), (0, 0, 0, 255)).convert(mode)
    assert (pixels(encode(clear)) == 255).all()
    assert (pixels(encode(half)) == 127).all()
    assert (pixels(encode(opaque)) == 0).all()


def test_transparent_colour_of_an_rgb_png_is_white():
    image = PIL.Image.new("RGB", (4, 4), (9, 9, 9))
    assert (pixels(encode(image, transparency=(9, 9, 9))) == 255).all()


@pytest.mark.parametrize("fmt", ["PNG", "TIFF"])
def test_sixteen_bit_grey_is_scaled_not_clipped(fmt):
    wide = np.array([[0, 257, 32768, 65535]], dtype=np.uint16)
    found = pixels(encode(PIL.Image.fromarray(wide), fmt))
    assert found[0].tolist() == [[0] * 3, [1] * 3, [128] * 3, [255] * 3]


def test_thirty_two_bit_and_float_greys():
    found = np.asarray(to_rgb(PIL.Image.fromarray(np.array([[0, 65535, 900000]], dtype=np.int32))))
    assert found[0, :, 0].tolist() == [0, 255, 255]
    unit = np.asarray(to_rgb(PIL.Image.fromarray(np.array([[0.0, 0.5, 1.0]], dtype=np.float32))))
    assert unit[0, :, 0].tolist() == [0, 128, 255]
    bytes_range = np.asarray(to_rgb(PIL.Image.fromarray(np.array([[0.0, 100, 300]], dtype=np.float32))))
    assert bytes_range[0, :, 0].tolist() == [0, 100, 255]


def test_one_bit_images_are_black_and_white():
    bits = PIL.Image.fromarray(np.array([[0, 255], [255, 0]], dtype=np.uint8)).convert("1")
    assert pixels(encode(bits))[..., 0].tolist() == [[0, 255], [255, 0]]


@pytest.mark.parametrize("fmt", ["GIF", "WEBP"])
def test_animations_give_their_first_frame(fmt):
    frames = [PIL.Image.new("RGB", (8, 8), colour) for colour in ((250, 0, 0), (0, 250, 0))]
    data = encode(frames[0], fmt, save_all=True, append_images=frames[1:], duration=10)
    assert pixels(data)[4, 4, 0] > 200


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (50, 1)])
def test_one_pixel_sides(size):
    assert pixels(encode(PIL.Image.new("RGB", size))).shape == (size[1], size[0], 3)


def test_huge_images_are_refused_before_they_are_decoded(monkeypatch):
    monkeypatch.setattr("vlm_distill_cache.common.pixels.MAX_PIXELS", 99)
    with pytest.raises(SampleError, match="image x has 10 x 10 pixels, more than the 99 allowed"):
        decode_image(encode(PIL.Image.new("RGB", (10, 10))), name="x")


@pytest.mark.parametrize("limit", [99, 40])
def test_decompression_bombs_are_sample_errors(monkeypatch, limit):
    """Pillow warns above its limit and raises above twice the limit."""
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(SampleError, match="decompression bomb"):
        decode_image(encode(PIL.Image.new("RGB", (10, 10))), name="x")


NOISE = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))


@pytest.mark.parametrize("fmt", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.95])
def test_truncated_files_are_sample_errors(fmt, share):
    data = encode(NOISE, fmt)
    with pytest.raises(SampleError, match=r"image half\.img cannot be decoded"):
        decode_image(data[: int(len(data) * share)], name="half.img")


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow warns of tags it skips, and goes on
@pytest.mark.parametrize("fmt", ["PNG", "JPEG", "WEBP", "GIF", "TIFF"])
def test_damaged_files_never_raise_anything_else(fmt):
    data = encode(NOISE, fmt)
    rng = np.random.default_rng(3)
    for _ in range(60):
        broken = bytearray(data)
        for position in rng.integers(0, min(len(data), 400), 6):
            broken[position] = rng.integers(0, 256)
        try:
            decode_image(bytes(broken), name="broken")
        except SampleError as error:
            assert "broken" in str(error)  # noqa: PT017 - decoding a harmless flip is fine too


def test_missing_empty_and_foreign_files_name_themselves(tmp_path):
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("hello")
    with pytest.raises(SampleError, match=r"empty.png is empty \(0 bytes\)"):
        ImageFile(tmp_path / "empty.png").load()
    with pytest.raises(SampleError, match=r"text.png cannot be decoded: no image of a known format"):
        ImageFile(tmp_path / "text.png").load()
    with pytest.raises(SampleError, match=r"gone.png cannot be read: No such file.*; look there"):
        ImageFile(tmp_path / "gone.png", hint="look there").load()
    with pytest.raises(SampleError, match="cannot be read"):
        ImageFile(tmp_path).load()
    with pytest.raises(SampleError, match="cannot be read"):
        ImageFile(Path("nul\0byte.png")).load()


def test_all_sources_give_the_same_pixels(tmp_path):
    data = encode(NOISE)
    path = tmp_path / "a.bin"
    path.write_bytes(b"??" + data + b"!!")
    (tmp_path / "a.png").write_bytes(data)
    sources = [
        ImageFile(tmp_path / "a.png"),
        ImageBytes(data, "bytes"),
        FileSlice(path, 2, len(data), "slice"),
    ]
    assert len({image_hash(source.load()) for source in sources}) == 1
    assert [source.name for source in sources][1:] == ["bytes", "slice"]


def test_slices_beyond_the_file_are_sample_errors(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"1234")
    with pytest.raises(SampleError, match="part is cut off: expected 9 bytes, got 2"):
        FileSlice(path, 2, 9, "part").load()
    with pytest.raises(SampleError, match="part cannot be read"):
        FileSlice(tmp_path / "gone", 2, 9, "part").load()


def test_hash_sees_shape_and_pixels_but_not_compression():
    wide = PIL.Image.new("RGB", (8, 2))
    assert image_hash(wide) != image_hash(PIL.Image.new("RGB", (2, 8)))
    assert image_hash(NOISE) != image_hash(NOISE.transpose(PIL.Image.Transpose.FLIP_LEFT_RIGHT))
    small, large = encode(NOISE, compress_level=9), encode(NOISE, compress_level=0)
    assert small != large
    assert image_hash(decode_image(small, name="s")) == image_hash(decode_image(large, name="l"))


def test_hash_is_pinned():
    """A cache written last year must match the same picture today."""
    assert image_hash(PIL.Image.new("RGB", (2, 1), (1, 2, 3))).hex() == "1b4705f60b017cc9eeb0984ec6f4e558"


@pytest.mark.parametrize("error", [AttributeError, ZeroDivisionError])
def test_what_pillow_raises_on_damaged_exif_is_a_sample_error(monkeypatch, error):
    def fail(image):
        raise error("inside Pillow")

    monkeypatch.setattr(PIL.ImageOps, "exif_transpose", fail)
    with pytest.raises(SampleError, match="image x cannot be decoded: inside Pillow"):
        decode_image(encode(NOISE), name="x")


def png(width, depth, colour, row, *chunks):
    """One row of samples as the PNG specification stores them, with further chunks in front of the pixels."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, 1, depth, colour, 0, 0, 0)
    return b"".join(
        [
            b"\x89PNG\r\n\x1a\n", chunk(b"IHDR", header), *(chunk(*pair) for pair in chunks),
            chunk(b"IDAT", zlib.compress(b"\0" + row)), chunk(b"IEND", b""),
        ]
    )  # fmt: skip


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_the_grey_that_a_png_names_as_transparent_is_white_at_every_depth(depth):
    top = 2**depth - 1
    values = [0, 1, top // 2, top] * 2
    bits = "".join(f"{value:0{depth}b}" for value in values)
    row = int(bits, 2).to_bytes(len(bits) // 8, "big")
    for named in sorted(set(values)):
        found = pixels(png(8, depth, 0, row, (b"tRNS", struct.pack(">H", named))))[0, :, 0]
        assert found.tolist() == [255 if value == named else (value * 255 + top // 2) // top for value in values]


def test_the_colour_that_a_deep_png_names_as_transparent_is_white():
    colours = [(256, 512, 768), (0, 65535, 0)]
    row = struct.pack(">6H", *colours[0], *colours[1])
    found = pixels(png(2, 16, 2, row, (b"tRNS", struct.pack(">3H", *colours[0]))))
    assert found[0].tolist() == [[255, 255, 255], [0, 255, 0]]


@pytest.mark.parametrize(
    "chunk",
    [
        (b"zTXt", b"parameters\0\0" + zlib.compress(b"a" * 3_000_000)),
        (b"iTXt", b"workflow\0\1\0\0\0" + zlib.compress(b"a" * 3_000_000)),
        (b"iCCP", b"profile\0\0" + zlib.compress(b"a" * 3_000_000)),
        (b"tEXt", b"parameters\0" + b"a" * (65 << 20)),
    ],
)
def test_a_picture_with_a_long_text_is_the_picture_without_it(chunk):
    row = bytes(range(12))
    np.testing.assert_array_equal(pixels(png(4, 8, 2, row, chunk)), pixels(png(4, 8, 2, row)))


def test_a_text_that_may_hold_the_orientation_is_not_left_out():
    chunk = (b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(b"a" * 3_000_000))
    with pytest.raises(SampleError, match="x cannot be decoded: Decompressed data too large"):
        pixels(png(4, 8, 2, bytes(12), chunk))
