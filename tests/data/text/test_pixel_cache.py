"""Pictures that were kept are the pictures that decoding gives, of the same bytes and settings, or they are decoded again."""

import dataclasses
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import transformers
from layout_cases import CASES, square

from vlm_distill_cache.common.errors import SampleError
from vlm_distill_cache.data.images.byte_pixels import BytePixels, held_of, pixel_tables
from vlm_distill_cache.data.images.encoder import ImageEncoder
from vlm_distill_cache.data.images.layouts.videos import FixedFrames, PatchedFrames, SquaredFrames
from vlm_distill_cache.data.images.load import FileSlice, ImageBytes, ImageFile
from vlm_distill_cache.data.images.video import FrameFolder, VideoBytes, VideoFile, VideoSlice
from vlm_distill_cache.data.sample import FrameSampling
from vlm_distill_cache.data.shapes.dataset import ShapesDataset
from vlm_distill_cache.data.text import media as media_module
from vlm_distill_cache.data.text import pixel_cache
from vlm_distill_cache.data.text.media import encode_media
from vlm_distill_cache.data.text.pixel_cache import FILE, PixelCache, identity_of

BIG = 1 << 30
SIZES = ((64, 64), (90, 40), (37, 80))


def settings(encoder, **changes):
    """What a `SampleEncoder` says of pictures."""
    found = SimpleNamespace(
        image_encoder=encoder, image_token="<image>", video_token="", sampling=FrameSampling(fps=1.0, most=3),
        most_pictures=None, pictures_beyond="refuse", visual_token_budget=None, pixel_tables=pixel_tables(encoder),
    )  # fmt: skip
    vars(found).update(changes)
    found.media_identity = identity_of(found)
    return found


def opened(folder, limit=BIG):
    cache = PixelCache()
    cache.open(folder, limit)
    return cache


def write_picture(path, size=(64, 48), seed=0):
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    PIL.Image.fromarray(noise).save(path)
    return ImageFile(path)


@pytest.fixture
def pictures(tmp_path):
    return [write_picture(tmp_path / f"{number}.png", size, number) for number, size in enumerate(SIZES)]


@contextmanager
def counted(monkeypatch):
    """How often pictures are encoded meanwhile."""
    calls = []

    def encode(of, media):
        calls.append(media)
        return encode_media(of, media)

    with monkeypatch.context() as patch:
        patch.setattr(pixel_cache, "encode_media", encode)
        yield calls


def same(found, known):
    """Whether encoded pictures are the same, to the last bit, and as they are held."""
    for one, other in zip(found, known, strict=True):
        assert dataclasses.replace(one, encoded=()) == dataclasses.replace(other, encoded=())
        for image, expected in zip(one.encoded, other.encoded, strict=True):
            assert (image.tiles, image.text) == (expected.tiles, expected.text)
            assert list(image.inputs) == list(expected.inputs)
            for name, held in held_of(expected.inputs).items():
                read = held_of(image.inputs)[name]
                assert isinstance(read, BytePixels) == isinstance(held, BytePixels)
                assert image.inputs[name].dtype == expected.inputs[name].dtype
                assert image.inputs[name].shape == expected.inputs[name].shape
                assert image.inputs[name].tobytes() == expected.inputs[name].tobytes()
    return True


@pytest.mark.parametrize("name", CASES)
def test_every_familys_pictures_are_read_as_they_are_encoded(name, tmp_path, pictures, monkeypatch):
    of = settings(CASES[name])
    cache = opened(tmp_path / "kept")
    samples = [pictures[:1], pictures, pictures[1:2], []]
    known = [encode_media(of, sample) for sample in samples]
    with counted(monkeypatch) as calls:
        for reader in (cache, cache, opened(tmp_path / "kept")):  # of another process
            assert all(
                same(reader.media(of, sample), expected) for sample, expected in zip(samples, known, strict=True)
            )
    assert [len(media) for media in calls] == [1, 3, 1, 0, 0, 0]  # who has no picture has nothing to keep
    if name not in ("square", "qwen"):
        return
    held = held_of(cache.media(of, pictures[:1])[0].encoded[0].inputs)["pixel_values"]
    assert (tmp_path / "kept" / FILE).stat().st_size < 5 * held.data.nbytes * 4


@pytest.mark.parametrize("name", ["pictures", "onevision", "smolvlm", "qwen"])
def test_videos_are_read_as_they_are_encoded(name, tmp_path, monkeypatch):
    for number in range(5):
        write_picture(tmp_path / f"{number}.png", seed=number)
    frames = [PIL.Image.open(tmp_path / f"{number}.png").convert("P") for number in range(5)]
    frames[0].save(tmp_path / "video.gif", save_all=True, append_images=frames[1:], duration=1000)
    data = (tmp_path / "video.gif").read_bytes()
    (tmp_path / "tar").write_bytes(b"before" + data + b"behind")
    (tmp_path / "frames").mkdir()
    for number in range(5):
        (tmp_path / f"{number}.png").rename(tmp_path / "frames" / f"{number}.png")
    videos = [
        VideoFile(tmp_path / "video.gif"), VideoSlice(tmp_path / "tar", 6, len(data), "slice"), VideoBytes(data, "bytes"),
        FrameFolder(tmp_path / "frames"), FrameFolder(tmp_path / "frames", fps=0.5),
    ]  # fmt: skip
    plain = transformers.CLIPImageProcessorPil(size=square(24), do_center_crop=False)
    encoder = {
        "pictures": CASES["square"],
        "onevision": replace(CASES["onevision"], frames=FixedFrames(images=ImageEncoder.from_processor(plain, (3, 3)))),
        "smolvlm": replace(CASES["smolvlm"], frames=SquaredFrames.of(CASES["smolvlm"].processor, {})),
        "qwen": replace(CASES["qwen"], frames=PatchedFrames.of(CASES["qwen"].processor, {})),
    }[name]
    of = settings(encoder, video_token="" if name == "pictures" else "<video>")
    known = [encode_media(of, [video]) for video in videos]
    cache = opened(tmp_path / "kept")
    with counted(monkeypatch) as calls:
        for _ in range(2):
            assert all(same(cache.media(of, [v]), expected) for v, expected in zip(videos, known, strict=True))
    assert len(calls) == 3  # a file, a range and bytes that are the same are one
    fewer = settings(encoder, video_token=of.video_token, sampling=FrameSampling(fps=1.0, most=2))
    with counted(monkeypatch) as calls:
        same(cache.media(fewer, videos[:1]), encode_media(fewer, videos[:1]))
    assert len(calls) == 1


def test_the_same_picture_from_elsewhere_is_the_same_and_a_changed_file_is_another(tmp_path, pictures, monkeypatch):
    of, cache = settings(CASES["square"]), opened(tmp_path / "kept")
    data = pictures[0].path.read_bytes()
    (tmp_path / "tar").write_bytes(b"before" + data)
    known = encode_media(of, pictures[:1])
    with counted(monkeypatch) as calls:
        for source in (pictures[0], ImageBytes(data, "bytes"), FileSlice(tmp_path / "tar", 6, len(data), "slice")):
            assert same(cache.media(of, [source]), known)
        assert len(calls) == 1
        write_picture(pictures[0].path, SIZES[0], seed=9)
        assert same(cache.media(of, pictures[:1]), encode_media(of, pictures[:1]))
        assert cache.media(of, pictures[:1])[0].hashes != known[0].hashes
    assert len(calls) == 2


def test_a_file_that_changes_while_it_is_decoded_is_not_kept(tmp_path, pictures, monkeypatch):
    of, cache = settings(CASES["square"]), opened(tmp_path / "kept")
    before = pictures[0].path.read_bytes()

    def changing(of, media):
        write_picture(pictures[0].path, SIZES[0], seed=9)
        return encode_media(of, media)

    with monkeypatch.context() as patch:
        patch.setattr(pixel_cache, "encode_media", changing)
        cache.media(of, pictures[:1])
    pictures[0].path.write_bytes(before)
    assert same(cache.media(of, pictures[:1]), encode_media(of, pictures[:1]))


def test_all_that_decides_what_becomes_of_a_picture_is_told_apart(monkeypatch):
    def clip(**options):
        processor = transformers.CLIPImageProcessorPil(size=square(32), crop_size=square(32), **options)
        return ImageEncoder(processor=processor, layout="square", grid=(8, 8))

    plain = clip(do_center_crop=False)
    others = [
        settings(plain),
        settings(clip(do_center_crop=False, image_mean=[0.1, 0.2, 0.3])),
        settings(clip(do_center_crop=False, resample=2)),
        settings(clip(do_center_crop=False, do_convert_rgb=False)),
        settings(replace(plain, layout="pad")),
        settings(plain.with_grid((4, 4))),
        settings(
            ImageEncoder(processor=transformers.SiglipImageProcessorPil(size=square(32)), layout="square", grid=(8, 8))
        ),
        settings(plain, image_token="<picture>"),
        settings(plain, sampling=FrameSampling(fps=2.0, most=3)),
        settings(plain, sampling=None),
        settings(plain, most_pictures=1),
        settings(plain, visual_token_budget=9),
    ]
    monkeypatch.setattr(pixel_cache, "_versions", lambda: {"pillow": "another"})
    others.append(settings(plain))
    names = [of.media_identity for of in others]
    assert None not in names
    assert len(set(names)) == len(names)


def test_what_cannot_be_told_is_encoded_each_time(tmp_path, monkeypatch):
    of, cache = settings(CASES["square"]), opened(tmp_path / "kept")
    drawn = ShapesDataset("train", 1)[0].images
    library = settings(SimpleNamespace(to_dict=lambda: {"kind": "library"}, processor=CASES["square"].processor))
    assert library.media_identity is None
    undescribed = settings(CASES["square"])
    undescribed.media_identity = None
    picture = write_picture(tmp_path / "0.png")
    with counted(monkeypatch) as calls:
        for _ in range(2):
            cache.media(of, drawn)
            cache.media(undescribed, [picture])
            cache.media(of, [picture, *drawn])
            PixelCache().media(of, [picture])  # it was not opened
    assert len(calls) == 8
    assert not (tmp_path / "kept" / FILE).exists()


def test_numbers_that_are_no_bytes_are_kept_as_they_are(tmp_path, pictures, monkeypatch):
    of, cache = settings(CASES["llava-next"], pixel_tables=()), opened(tmp_path / "kept")
    known = encode_media(of, pictures)
    assert not any(isinstance(held, BytePixels) for held in held_of(known[0].encoded[0].inputs).values())
    with counted(monkeypatch) as calls:
        assert same(cache.media(of, pictures), known)
        assert same(cache.media(of, pictures), known)
    assert len(calls) == 1


def test_an_unreadable_picture_fails_as_without_a_cache(tmp_path):
    of, cache = settings(CASES["square"]), opened(tmp_path / "kept")
    (tmp_path / "torn.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    for source in (
        ImageFile(tmp_path / "torn.png"),
        ImageFile(tmp_path / "none.png"),
        VideoFile(tmp_path / "none.mp4"),
    ):
        with pytest.raises(SampleError) as expected:
            encode_media(of, [source])
        for _ in range(2):
            with pytest.raises(SampleError) as found:
                cache.media(of, [source])
            assert str(found.value) == str(expected.value)


def test_a_record_that_says_something_else_is_encoded_again(tmp_path, pictures, monkeypatch):
    of = settings(CASES["square"])
    known = encode_media(of, pictures[:1])
    whole = b"".join(pixel_cache._pack(known, of.pixel_tables))
    assert same(pixel_cache._unpack(whole, of.pixel_tables), known)
    for cut in (0, 3, 10, len(whole) // 2, len(whole) - 1):
        assert pixel_cache._unpack(whole[:cut], of.pixel_tables) is None
    for old, new in (
        (b'"|u1"', b'"|O8"'),
        (b'"tiles"', b'"wrong"'),
        (b'"|u1"', b'"zzz"'),
        (b"[[", b"{{"),
        (b"3, 1024", b"7, 1024"),
    ):
        assert old in whole
        assert pixel_cache._unpack(whole.replace(old, new, 1), of.pixel_tables) is None
    assert pixel_cache._unpack(whole, ()) is None
    cache = opened(tmp_path / "kept")
    cache._records.put(pixel_cache._key(of, pictures[:1]), [b"nothing"])
    assert same(cache.media(of, pictures[:1]), known)


def test_a_full_cache_decodes_what_it_has_no_room_for(tmp_path, pictures, monkeypatch):
    of = settings(CASES["square"])
    cache = opened(tmp_path / "kept", limit=9_000)
    with counted(monkeypatch) as calls:
        for _ in range(3):
            for source in pictures:
                assert same(cache.media(of, [source]), encode_media(of, [source]))
    assert len(calls) == 5  # the first two are kept, 3 kB each
    assert (tmp_path / "kept" / FILE).stat().st_size <= 9_000
    assert media_module.encode_media is encode_media
