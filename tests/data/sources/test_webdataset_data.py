"""Tars of image + JSON: random access gives what streaming them with the library gives."""

import io
import json
import pickle
import tarfile

import PIL.Image
import pytest
from webdataset.tariterators import group_by_keys, tar_file_iterator

from vlm_distill_cache.common.errors import DataError, SampleError
from vlm_distill_cache.data.sources.webdataset import WebDataset

LLAVA = {"conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A circle."}]}


def picture(value, fmt="PNG"):
    buffer = io.BytesIO()
    PIL.Image.new("RGB", (4, 4), (value, value, value)).save(buffer, fmt)
    return buffer.getvalue()


def write_tar(path, members, mode="w"):
    with tarfile.open(path, mode) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def entry(key, record, value=0, extension="png"):
    return [(f"{key}.{extension}", picture(value)), (f"{key}.json", json.dumps(record).encode())]


def test_random_access_equals_streaming(tmp_path):
    members = [part for i in range(6) for part in entry(f"part/{i:03d}", {"caption": f"number {i}"}, 10 * i)]
    path = write_tar(tmp_path / "a.tar", members)
    dataset = WebDataset(str(path))
    with path.open("rb") as file:
        streamed = list(group_by_keys(dict(part, __url__="") for part in tar_file_iterator(file)))
    assert list(dataset.sample_ids) == [item["__key__"] for item in streamed]
    for index in (5, 0, 3):
        assert dataset[index].turns[0].answer == json.loads(streamed[index]["json"])["caption"]
        assert dataset[index].images[0].read() == streamed[index]["png"]
        assert dataset[index].images[0].load().getpixel((0, 0)) == (10 * index,) * 3


def test_every_form_of_text_is_read(tmp_path):
    members = [
        *entry("a", LLAVA, extension="jpg"),
        *entry("b", {"messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "B"}]}),
        *entry("c", LLAVA["conversations"]),
        ("d.webp", picture(1, "WEBP")),
        ("d.txt", b"A caption.\n"),
        ("e.json", b'{"question": "What?", "answer": "A circle."}'),
        ("f.png", picture(1)),
        ("readme", b"no key"),
    ]
    dataset = WebDataset(str(write_tar(tmp_path / "a.tar", members)))
    assert list(dataset.sample_ids) == list("abcde")
    assert [dataset[i].turns[0].answer for i in range(5)] == [
        "A circle.",
        "B",
        "A circle.",
        "A caption.",
        "A circle.",
    ]
    assert [len(dataset[i].images) for i in range(5)] == [1, 1, 1, 1, 0]


def test_braces_globs_and_folders_name_the_same_tars(tmp_path):
    for shard in range(3):
        write_tar(tmp_path / f"s-{shard}.tar", entry(f"k{shard}", {"caption": "x"}))
    for pattern in ("s-{0..2}.tar", "s-*.tar", ""):
        dataset = WebDataset(str(tmp_path / pattern))
        assert list(dataset.sample_ids) == ["k0", "k1", "k2"]
    copied = pickle.loads(pickle.dumps(dataset))  # noqa: S301 - our own bytes
    assert copied.fingerprint() == dataset.fingerprint()


def test_damaged_samples_are_their_own_errors(tmp_path):
    members = [
        ("a.json", b"{"),
        ("b.json", b"3"),
        ("c.json", b"\xff"),
        ("d.json", b'{"text": "x"}'),
        ("e.png", picture(0)[:40]),
        ("e.json", b'{"caption": "x"}'),
    ]
    dataset = WebDataset(str(write_tar(tmp_path / "a.tar", members)))
    for index, message in enumerate(
        ("is not JSON", "expected an object, got int", "is not UTF-8", "expected 'messages'")
    ):
        with pytest.raises(SampleError, match=f"sample '{'abcd'[index]}': .*{message}"):
            dataset[index]
    with pytest.raises(SampleError, match=r"a\.tar:e\.png cannot be decoded"):
        dataset[4].images[0].load()


def test_unusable_tars_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"no tar at .*gone\.tar"):
        WebDataset(str(tmp_path / "gone.tar"))
    with pytest.raises(DataError, match="no tar at"):
        WebDataset(str(tmp_path))
    packed = write_tar(tmp_path / "packed.tar", entry("a", LLAVA), mode="w:gz")
    with pytest.raises(DataError, match=r"unpack \.tar\.gz first"):
        WebDataset(str(packed))
    pictures = write_tar(tmp_path / "pictures.tar", [("a.png", picture(0))])
    with pytest.raises(DataError, match=r"no member KEY\.json or KEY\.txt"):
        WebDataset(str(pictures))


def test_keys_repeated_in_another_tar_are_refused(tmp_path):
    write_tar(tmp_path / "a.tar", entry("k", LLAVA))
    write_tar(tmp_path / "b.tar", entry("k", LLAVA))
    with pytest.raises(DataError, match="1 ids occur more than once: 'k'"):
        WebDataset(str(tmp_path))


def test_a_sample_that_asks_about_an_image_it_has_not_is_refused(tmp_path):
    dataset = WebDataset(str(write_tar(tmp_path / "a.tar", [("a.json", json.dumps(LLAVA).encode())])))
    with pytest.raises(SampleError, match=r"sample 'a': .*names no image"):
        dataset[0]


@pytest.mark.parametrize(("key", "message"), [("k" * 4097, "4097 bytes"), ("k\udcff", "lone surrogate")])
def test_keys_that_no_store_could_keep_are_refused(tmp_path, key, message):
    path = write_tar(tmp_path / "a.tar", [(f"{key}.json", json.dumps(LLAVA).encode())])
    with pytest.raises(DataError, match=f"the id of entry 0 .*{message}"):
        WebDataset(str(path))
