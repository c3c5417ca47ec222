"""The values of a JSON list, found one after another in windows of a file, are those of the list parsed as a whole."""

import io
import json
import random
from array import array
from itertools import pairwise

import pytest

from vlm_distill_cache.common.errors import DataError, SampleError
from vlm_distill_cache.data.sample import resolve_ids
from vlm_distill_cache.data.sources import json_text
from vlm_distill_cache.data.sources.conversations import is_entry
from vlm_distill_cache.data.sources.entries import id_and_content
from vlm_distill_cache.data.sources.json_text import parse_bytes, scan_list
from vlm_distill_cache.data.sources.llava import LlavaDataset

TEXTS = ["", "a", "é", "\u2028", "\U0001f600", "\x7f", '"', "\\", "\\\\", '",', "]", "}", "{[", ' \\" ', "\n"]
SPELT = [  # as a file may write them: escaped or not, surrogates as pairs, or alone, which `json` reads, too
    *(json.dumps(text, ensure_ascii=ascii_) for text in TEXTS for ascii_ in (True, False)),
    *(r'"\ud83d\ude00"', r'"\ud83d"', r'"\ude00\ud83d"', r'"\u005b\u0022,"', r'"\/\b\f\n\r\t"'),
]
NUMBERS = ["0", "-0", "1", "-12", "1e5", "1E-7", "-0.5e+300", "1e999", "9" * 400, "0." + "3" * 400, "1.0"]
NUMBERS += ["NaN", "Infinity", "-Infinity", "true", "false", "null"]
FAULTS = [b",", b"]", b"[", b'"', b"\\", b"1", b"\n", b"\0", b"\xff", b"\xc3", b"\xef\xbb\xbf", b"'", b"//"]


def white(draw):
    return "".join(draw.choices(" \t\n\r", k=draw.choice([0, 0, 1, 3])))


def document(draw, depth=0):
    """Any JSON, as any program may lay it out; a list at the top."""
    kind = draw.randrange(4) if depth else 3
    if kind == 0 or depth > 3:
        return draw.choice(SPELT)
    if kind == 1:
        return draw.choice(NUMBERS)
    items = [document(draw, depth + 1) for _ in range(draw.randrange(4))]
    if kind == 2:
        items = [f"{draw.choice(SPELT)}{white(draw)}:{white(draw)}{item}" for item in items]
    laid = ",".join(f"{white(draw)}{item}{white(draw)}" for item in items) or white(draw)
    return f"{{{laid}}}" if kind == 2 else f"[{laid}]"


class InParts:
    """A file whose reads give as few bytes as they may."""

    def __init__(self, data, most):
        self._file, self._most = io.BytesIO(data), most

    def read(self, size):
        return self._file.read(min(size, self._most))


def scanned(data, most=1 << 20):
    """The values, and the bytes that each is found in again."""
    offsets = array("q")
    values = list(scan_list(InParts(data, most), offsets))
    pieces = [data[a:b].rstrip(b" \t\n\r").removesuffix(b",") for a, b in pairwise(offsets)]
    return values, pieces


def same(one, other):
    return json.dumps(one) == json.dumps(other)  # NaN is not equal to itself


@pytest.mark.parametrize("seed", range(4))
def test_values_and_places_are_those_of_the_whole(seed):
    draw = random.Random(seed)
    for _ in range(300):
        data = (white(draw) + document(draw) + white(draw)).encode()
        values, pieces = scanned(data, draw.randrange(1, 30))
        assert same(values, json.loads(data)), data
        assert same([json.loads(piece) for piece in pieces], values), data


def or_broken(read, data):
    try:
        found = read(data)
    except ValueError:
        return "broken"
    return json.dumps(found) if isinstance(found, list) else "broken"


@pytest.mark.parametrize("seed", range(4))
def test_what_is_broken_as_a_whole_is_broken_in_parts(seed):
    draw = random.Random(seed)
    broken = 0
    for _ in range(400):
        data = bytearray(document(draw).encode())
        at = draw.randrange(len(data) + 1)
        data[at : at + draw.randrange(3)] = draw.choice([b"", *FAULTS])
        expected = or_broken(lambda data: json.loads(data.decode()), data)
        assert or_broken(lambda data: scanned(data, draw.randrange(1, 30))[0], bytes(data)) == expected, data
        broken += expected == "broken"
    assert 100 < broken < 390


def test_only_some_text_is_held_at_a_time():
    entry = json.dumps({"id": "x", "text": "é" * 1000}, ensure_ascii=False)
    data = f"[{','.join([entry] * 5000)}]".encode()  # 10 MB
    held = []

    class Watched(io.BytesIO):
        def read(self, size):
            held.append(size)
            return super().read(size)

    offsets = array("q")
    assert sum(1 for _ in scan_list(Watched(data), offsets)) == 5000
    assert max(held) == json_text._READ
    assert len(held) <= len(data) / json_text._READ + 2
    assert offsets[-1] == len(data) - 1


def test_an_entry_larger_than_what_is_read_at_a_time_is_read_in_few_parts():
    data = json.dumps(["x" * (9 << 20), 1]).encode()
    reads = []

    class Watched(io.BytesIO):
        def read(self, size):
            reads.append(size)
            return super().read(size)

    assert len(list(scan_list(Watched(data), array("q")))) == 2
    assert len(reads) <= 7


IDS = [None, 0, 3, "3", "a", "a", "a#2", "", "\ud83d", 1.5, True, ["x"], "é"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32-be"])
def test_a_list_has_the_ids_and_entries_of_the_whole(tmp_path, encoding):
    draw, path = random.Random(encoding), tmp_path / "any.json"
    for _ in range(25):
        entries = [
            {draw.choice(["id", "question_id"]): draw.choice(IDS), "caption": draw.choice("é[")} for _ in range(9)
        ]
        entries += [None, 3, "x", [], {}, {"caption": "one"}]
        draw.shuffle(entries)
        for text in (json.dumps(entries, indent=draw.choice([None, 1])), json.dumps(entries[:6], ensure_ascii=False)):
            if "\ud83d" not in text:
                path.write_bytes(text.encode(encoding))
                check_against_the_whole(path)


def check_against_the_whole(path):
    """Compare a list with what `json` and `resolve_ids` make of all of it."""
    whole = parse_bytes(path.read_bytes(), where="")
    if not any(isinstance(entry, dict) and is_entry(entry) for entry in whole):
        with pytest.raises(DataError, match="no entry has"):
            LlavaDataset(path)
        return
    ids, odd = resolve_ids(map(id_and_content, whole), where="")
    data = LlavaDataset(path)
    assert (data.sample_ids, data.odd_ids) == (ids, odd)
    for place, entry in enumerate(whole):
        if isinstance(entry, dict):
            assert same(data.read(place), entry)
        else:
            with pytest.raises(SampleError, match=f"entry {place} must be an object"):
                data.read(place)


def test_a_file_that_is_whole_again_after_it_was_scanned_is_refused_in_words(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    path.write_text('[{"caption": "x"}')
    parse = json_text.parse
    monkeypatch.setattr(json_text, "parse", lambda text, **where: parse(text + "]", **where))
    with pytest.raises(DataError, match="was changed while it was read"):
        LlavaDataset(path)
