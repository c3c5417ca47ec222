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
        ("e.json", b'{"question": "What?", "answer": "A circle.", "image": null}'),
        ("f.png", picture(1)),
        ("readme", b"no key"),
    ]
    dataset = WebDataset(str(write_tar(tmp_path / "a.tar", members)))
    assert list(dataset.sample_ids) == [*"abcdef", "a.tar:readme"]
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
        ("is not JSON", "expected an object, got int", "is not UTF-8", "caption of a picture, and it has none")
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
def test_a_key_that_no_store_could_keep_is_that_samples_error(tmp_path, key, message):
    dataset = WebDataset(str(write_tar(tmp_path / "a.tar", [(f"{key}.json", json.dumps(LLAVA).encode())])))
    with pytest.raises(SampleError, match=message):
        dataset[0]


def readable(path):
    """Ids of the samples that can be used with their number of pictures, and the reasons of all others by id."""
    dataset, kept, failed = WebDataset(str(path)), {}, {}
    for index, sample_id in enumerate(dataset.sample_ids):
        try:
            sample = dataset[index]
            kept[sample_id] = len([image.load() for image in sample.images])
        except SampleError as error:
            failed[sample_id] = str(error)
    return kept, failed


def texts(*keys, extension="txt"):
    return [(f"{key}.{extension}", f"this is {key}".encode()) for key in keys]


def asked(key):
    return f"{key}.json", b'{"question": "Why?", "answer": "So."}'


def test_a_key_ends_at_the_first_dot_and_what_that_makes_unclear_is_said(tmp_path):
    dotted = [
        part
        for number in (6, 7)
        for part in [(f"scene.{number}.png", picture(number)), (f"scene.{number}.json", b'{"caption": "x"}')]
    ]
    kept, failed = readable(write_tar(tmp_path / "a.tar", [*entry("a", {"caption": "x"}), *dotted]))
    assert kept == {"a": 1}
    assert failed.keys() == {"scene.6", "scene.7"}
    assert all("2 texts of the key 'scene'" in reason and "first dot" in reason for reason in failed.values())


@pytest.mark.parametrize(
    ("picture_name", "text_name"),
    [("k.input.png", "k.output.txt"), ("k.png", "k.png.txt"), ("k.PNG", "k.Caption"), ("k.image.jpg", "k.text.txt")],
)
def test_extensions_of_two_parts_are_known_by_the_last(tmp_path, picture_name, text_name):
    path = write_tar(tmp_path / "a.tar", [(picture_name, picture(0)), (text_name, b"A caption.")])
    assert readable(path) == ({"k": 1}, {})
    assert WebDataset(str(path))[0].turns[0].answer == "A caption."


@pytest.mark.parametrize("metadata", [{"width": 64, "url": None}, {"caption": None}, {"caption": ""}])
def test_json_without_a_text_does_not_hide_the_caption_beside_it(tmp_path, metadata):
    members = [("k.png", picture(0)), ("k.json", json.dumps(metadata).encode()), ("k.txt", b"A caption.")]
    path = write_tar(tmp_path / "a.tar", members)
    assert WebDataset(str(path))[0].turns[0].answer == "A caption."


def test_a_caption_is_no_answer_to_a_question_without_one(tmp_path):
    members = [("k.png", picture(0)), ("k.json", b'{"question": "What?"}'), ("k.txt", b"A caption.")]
    _, failed = readable(write_tar(tmp_path / "a.tar", members))
    assert "expected 'messages'" in failed["k"]


def test_every_member_is_a_samples_or_said(tmp_path):
    members = [
        *entry("a", {"caption": "x"}),
        ("b.png", picture(0)),  # no text
        *texts("c"),  # no picture
        ("d.txt", b"x"),
        ("d.pdf", b"x\0"),  # nothing that is read
        ("plain", b"x"),  # no extension
        (".hidden.png", picture(0)),  # WebDataset sees no key
        ("e.npy", b"x"),
        *entry("f", {"caption": "x"}),
        ("f.png", picture(1)),  # twice
        ("g.txt", b"\xff"),
        ("g.png", picture(0)),
        ("._a.png", b"junk of a Mac"),
        ("x/.DS_Store", b"junk"),
        ("__MACOSX/a.png", b"junk"),
    ]
    kept, failed = readable(write_tar(tmp_path / "a.tar", members))
    assert kept == {"a": 1}
    for key, message in {
        "b": "no member KEY.json or KEY.txt beside a.tar:b.png",
        "c": "would be the caption of a picture, and it has none",
        "d": "d.pdf is no picture that can be read",
        "a.tar:plain": "belongs to no sample",
        "a.tar:.hidden.png": "belongs to no sample",
        "e": "no member KEY.json or KEY.txt",
        "f": "holds f.png twice",
        "g": "not UTF-8",
    }.items():
        assert message in failed.pop(key)
    assert not failed


def test_pictures_are_known_by_any_extension_of_pillow_and_else_by_what_they_hold(tmp_path):
    extensions = ("PNG", "Jpg", "jfif", "jpe", "ppm", "img", "bin", "pic0")
    names = [f"{number}.{extension}" for number, extension in enumerate(extensions)]
    members = [part for name in names for part in [(name, picture(0)), *texts(name[0])]]
    kept, failed = readable(write_tar(tmp_path / "a.tar", members))
    assert (set(kept.values()), len(kept), failed) == ({1}, len(names), {})


def link(name, target, kind):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def test_links_are_followed_inside_the_archive_and_nowhere_else(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for name, data in [("x/a.png", picture(7)), *[(f"x/{key}.txt", b"text") for key in "abcdefg"]]:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        for info in (
            link("x/b.png", "x/a.png", tarfile.LNKTYPE),
            link("x/c.png", "a.png", tarfile.SYMTYPE),
            link("x/d.png", "../x/b.png", tarfile.SYMTYPE),
            link("x/e.png", "/etc/passwd", tarfile.SYMTYPE),
            link("x/f.png", "g.png", tarfile.SYMTYPE),
            link("x/g.png", "f.png", tarfile.SYMTYPE),
        ):
            tar.addfile(info)
    kept, failed = readable(path)
    assert kept == {f"x/{key}": 1 for key in "abcd"}
    assert failed.keys() == {"x/e", "x/f", "x/g"}
    assert all("is a link to" in reason and "not in the archive" in reason for reason in failed.values())
    assert WebDataset(str(path))[3].images[0].load().getpixel((0, 0)) == (7, 7, 7)


def test_an_archive_cut_off_at_any_place_is_refused_or_whole(tmp_path):
    members = [part for key in "ab" for part in entry(key, {"caption": "x"})]
    whole = write_tar(tmp_path / "whole.tar", members).read_bytes()
    end = len(whole.rstrip(b"\0"))
    end += -end % 512  # of the last member's last block
    cut = tmp_path / "cut.tar"
    for size in (*range(0, end, 64), end, end + 511):
        cut.write_bytes(whole[:size])
        with pytest.raises(DataError):
            WebDataset(str(cut))
    for size in range(end + 512, len(whole), 512):
        cut.write_bytes(whole[:size])
        assert readable(cut) == ({"a": 1, "b": 1}, {})


def test_damaged_headers_and_what_follows_the_end_mark_are_refused(tmp_path):
    whole = write_tar(tmp_path / "a.tar", [part for key in "ab" for part in entry(key, {"caption": "x"})]).read_bytes()
    second = whole.index(b"b.png")
    (tmp_path / "b.tar").write_bytes(whole[:second] + b"?" + whole[second + 1 :])
    with pytest.raises(DataError, match=rf"cut off or damaged at byte {second}"):
        WebDataset(str(tmp_path / "b.tar"))
    (tmp_path / "c.tar").write_bytes(whole + whole)
    with pytest.raises(DataError, match="several archives in one file"):
        WebDataset(str(tmp_path / "c.tar"))


def test_in_an_archive_of_pictures_only_data_that_say_so_are_text_alone(tmp_path):
    plain = [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]
    marked = write_tar(tmp_path / "a.tar", [*entry("a", LLAVA), ("b.json", json.dumps(plain).encode())])
    assert readable(marked) == ({"a": 1, "b": 0}, {})  # questions about pictures have the marker here, this one has not
    unmarked = [
        *entry("a", {"conversations": plain}),
        ("b.json", json.dumps(plain).encode()),
        ("c.json", json.dumps({"conversations": plain, "image": None}).encode()),
    ]
    kept, failed = readable(write_tar(tmp_path / "b.tar", unmarked))
    assert kept == {"a": 1, "c": 0}
    assert "it has no picture" in failed["b"]
    kept, failed = readable(write_tar(tmp_path / "c.tar", texts(*"ab")))
    assert not kept
    assert all("would be the caption of a picture" in reason for reason in failed.values())


def test_a_picture_that_the_json_names_is_not_another_members(tmp_path):
    members = [asked("a"), ("b.json", json.dumps({"caption": "x", "image": "b/1.png"}).encode())]
    kept, failed = readable(write_tar(tmp_path / "a.tar", members))
    assert kept == {"a": 0}
    assert "names the image str 'b/1.png', which does not lie beside it" in failed["b"]


def test_a_picture_that_all_others_have_is_missed_whatever_the_first_sample_says(tmp_path):
    def asked(question):
        return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": "x"}]}

    members = [*entry("a", LLAVA), *entry("b", asked("What?")), ("c.json", json.dumps(asked("Why?")).encode())]
    kept, failed = readable(write_tar(tmp_path / "a.tar", members))
    assert kept == {"a": 1, "b": 1}
    assert "it has no picture" in failed["c"]
    members = [("a.bin", picture(0)), *texts("a"), *texts("b")]  # known by what it holds
    kept, failed = readable(write_tar(tmp_path / "b.tar", members))
    assert (kept, failed.keys()) == ({"a": 1}, {"b"})


def test_a_member_that_is_neither_text_nor_picture_is_not_passed_over_where_there_is_no_picture(tmp_path):
    members = [
        ("a.npy", b"\x93NUMPY\x01\0"),
        asked("a"),
        ("b.cls", b"3"),
        asked("b"),
        ("c.png.gz", b"\x1f\x8b\x08\0"),
        asked("c"),
    ]
    kept, failed = readable(write_tar(tmp_path / "a.tar", members))
    assert kept == {"b": 0}
    assert all("is no picture that can be read" in reason for reason in failed.values())


def test_several_texts_of_one_kind_are_not_chosen_among(tmp_path):
    members = [("a.png", picture(0)), *texts("a"), *texts("a", extension="caption")]
    _, failed = readable(write_tar(tmp_path / "a.tar", [*members, *entry("b", {"caption": "x"})]))
    assert "several texts of the key 'a'" in failed["a"]


def test_what_the_json_says_of_other_files_does_not_matter_where_the_picture_lies_beside_it(tmp_path):
    record = {"caption": "x", "url": "https://example.org/1.jpg", "thumbnail": "t.png", "video": "x.mp4"}
    assert readable(write_tar(tmp_path / "a.tar", entry("a", record))) == ({"a": 1}, {})
    kept, failed = readable(write_tar(tmp_path / "b.tar", entry("a", {"caption": "x", "images": ["1.png", "2.png"]})))
    assert not kept
    assert "which does not lie beside it" in failed["a"]


def test_a_member_without_an_extension_hides_no_sample_of_its_name(tmp_path):
    members = [("a", b"x"), *entry("a", {"caption": "x"}), ("README", b"x")]
    kept, failed = readable(write_tar(tmp_path / "a.tar", members))
    assert kept == {"a": 1}
    assert failed.keys() == {"a.tar:a", "a.tar:README"}
    write_tar(tmp_path / "b.tar", [("README", b"x"), *entry("b", {"caption": "x"})])
    assert len(WebDataset(str(tmp_path))) == 5  # each archive may hold its own


def test_only_names_that_begin_as_metadata_are_passed_over_and_that_is_said(tmp_path, caplog):
    members = [*entry("data/__train__/a", {"caption": "x"}), *entry("__train__/b", {"caption": "x"})]
    assert readable(write_tar(tmp_path / "a.tar", members)) == ({"data/__train__/a": 1}, {})
    assert "2 members are metadata to WebDataset and are not read, the first __train__/b.png" in caplog.text
