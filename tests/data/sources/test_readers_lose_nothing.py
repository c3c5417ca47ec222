"""Whatever a file holds, a reader gives samples and reasons, one for each entry, and no picture is lost in silence."""

import base64
import copy
import io
import json
import math
import re
import tarfile

import PIL.Image
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vlm_distill_cache.common.errors import DataError, SampleError
from vlm_distill_cache.data.sources.hf import HuggingFaceDataset
from vlm_distill_cache.data.sources.llava import LlavaDataset
from vlm_distill_cache.data.sources.messages import MessagesDataset
from vlm_distill_cache.data.sources.webdataset import WebDataset

_buffer = io.BytesIO()
PIL.Image.new("RGB", (3, 3)).save(_buffer, "PNG")
PNG = _buffer.getvalue()
BASE64 = base64.b64encode(PNG).decode()
GOOD = {"id": "good", "question": "how", "answer": "fine"}

# The readers' own vocabulary: entries in every form, and the names and values that may stand in one another's place.
ENTRIES = [
    {
        "id": "e",
        "image": "a.png",
        "conversations": [{"from": "human", "value": "<image>\nwhat"}, {"from": "gpt", "value": "x"}],
    },
    {"id": "e", "conversations": [{"from": "human", "value": "why"}, {"from": "gpt", "value": "x"}]},
    {"images": ["a.png"], "messages": [{"role": "user", "content": "what"}, {"role": "assistant", "content": "x"}]},
    {
        "messages": [
            {"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "what"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "x"}]},
        ]
    },
    {"image": BASE64, "question": "what", "answer": "x"},
    {"image_path": "gone.png", "question": "what", "answers": ["x", "y", "x"]},
    {"image": {"bytes": None, "path": "a.png"}, "caption": "x"},
    {"question": "what ![](a.png)", "answer": 3},
    {"question": "why", "answer": "x", "note": "n"},
    {"image": None, "caption": "x"},
    {"images": ["a.png"], "texts": [{"user": "what", "assistant": "x", "source": "s"}], "image_min": 3},
    {"image": "a.png", "conversations": {"from": ["human", "gpt"], "value": ["what", "x"]}, "system": "be kind"},
    {
        "messages": [
            {"role": "system", "content": "be kind"},
            {"role": "user", "content": "why"},
            {"role": "assistant", "content": "x"},
        ]
    },
    {"images": ["a.png"], "query": "what", "response": "x", "history": [["why", "y"]], "system": "be kind"},
    {
        "image": "a.png",
        "prompt": [{"role": "user", "content": "what"}],
        "completion": [{"role": "assistant", "content": "x"}],
    },
    {"instruction": "why", "input": "so", "output": "x"},
    {"file_name": "a.png", "text": "x"},
    {"image": "a.png", "mask": None, "question": "what", "context": "so", "answer": "x", "label": True},
    {"prompt": "why", "completion": "x", "label": 1, "hint": ""},
    {
        "System": "be kind",
        "conversations": [{"from": "human", "value": "why", "weight": 0}, {"from": "gpt", "value": "x", "weight": 1}],
    },
    {
        "messages": json.dumps([{"role": "user", "content": "why"}, {"role": "assistant", "content": "x"}]),
        "audio": None,
    },
]
NAMES = [
    "image", "images", "image_path", "img", "file_name", "video", "anything", "meta", "id", "question", "answer", "answers",
    "caption", "messages", "conversations", "role", "from", "content", "value", "type", "text", "url", "bytes", "path",
    "texts", "user", "assistant", "query", "response", "history", "system", "prompt", "completion", "input", "output",
    "mask", "reference_image", "context", "hint", "label", "kto_tag", "weight", "thinking", "System", "audio",
]  # fmt: skip
VALUES = [
    None, "", " ", 0, 3, -1.5, math.nan, True, False, [], {}, [None], "a.png", ["a.png"], "gone.png", ["a.png", "a.png"],
    {"path": "a.png"}, {"bytes": BASE64}, BASE64, "data:image/png;base64," + BASE64, "https://example.org/a.png", "b.mp4",
    "<image>", "<image> what", [["why", "x"]], "system", {"from": ["human", "gpt"], "value": ["why", "x"]},
    [{"user": "why", "assistant": "x"}], "<img>a.png</img> what", "<video> what", "plain", "user", "assistant", "human", "gpt",
    "image", "text", "\ud83d", "x" * 5000, [["a.png"]], {"image": "a.png"}, {"type": "image"}, {"x": {"y": "a.png"}},
]  # fmt: skip


def places(value, path=()):
    """Every key and index of a nested value, by its path."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in list(items):
        yield (*path, key)
        yield from places(item, (*path, key))


def inside(value, path):
    for key in path:
        value = value[key]
    return value


@st.composite
def entries(draw, values=VALUES):
    """An entry with up to three keys renamed, dropped, retyped, nested or added."""
    entry = copy.deepcopy(draw(st.sampled_from(ENTRIES)))
    for _ in range(draw(st.integers(0, 3))):
        found = [path for path in places(entry) if isinstance(inside(entry, path[:-1]), dict)]
        if not found:
            break
        *parents, key = draw(st.sampled_from(found))
        holder = inside(entry, parents)
        change = draw(st.sampled_from(["rename", "drop", "retype", "nest", "wrap", "add"]))
        if change == "rename":
            holder[draw(st.sampled_from(NAMES))] = holder.pop(key)
        elif change == "drop":
            del holder[key]
        elif change == "retype":
            holder[key] = copy.deepcopy(draw(st.sampled_from(values)))
        elif change == "nest":
            holder[key] = {draw(st.sampled_from(NAMES)): holder[key]}
        elif change == "wrap":
            holder[key] = [holder[key]]
        else:
            holder[draw(st.sampled_from(NAMES))] = copy.deepcopy(draw(st.sampled_from(values)))
    return entry


TEXTS = {"answer", "answers", "caption", "multiple_choice_answer", "response", "completion", "output", "assistant"}
SPEAKS = re.compile(r"image|img|picture|\.png|video|\.mp4|data:|iVBOR", re.IGNORECASE)


def pruned(value):
    """Without answers, and without what is null, false or empty: the slow reference of what an entry speaks of."""
    if isinstance(value, dict):
        if value.get("role") == "assistant" or value.get("from") == "gpt":
            return None
        # The word alone is a text like any other, but for the type of a part.
        kept = {key: item for key, item in value.items() if key not in TEXTS and (item != "image" or key == "type")}
        kept = {key: item for key, item in kept.items() if key != "image_min" or not rates(item)}
        kept = {key: pruned(item) for key, item in kept.items()}
        kept = {key: item for key, item in kept.items() if item is not None}
        return kept or None
    if isinstance(value, list):
        return [pruned(item) for item in value] or None
    return None if value is False or (isinstance(value, str) and not value.strip()) else value


def rates(value):
    """Whether a value is a number, or a list of such."""
    return all(
        item is None or isinstance(item, int | float) for item in (value if isinstance(value, list) else [value])
    )


def speaks_of_a_picture(entry):
    left = pruned(entry)
    unread = {"id", "text", "url"}  # the first is a name; a text in no known form refuses the entry
    left = {key: value for key, value in (left or {}).items() if key not in unread}
    return bool(SPEAKS.search(json.dumps(left, default=str)))


PICTURED = ("image", "images", "img", "mask", "reference_image")
JOINED = ("context", "hint", "System", "system")


def is_lossy(entry, sample):
    """Whether something of an entry is not in its sample: the slow reference of what may not be lost."""
    if not isinstance(entry, dict):
        return True
    named = [entry[key] for key in PICTURED if key in entry]
    files = {name for value in named for name in (value if isinstance(value, list) else [value]) if is_file(name)}
    turns = [text for turn in sample.turns for text in (turn.question, turn.answer)]
    texts = " ".join([*turns, sample.system])
    if not sample.images and sample.turns[0].question == "" and len(turns) == 2 and "caption" in entry:
        return True
    # A context of a list of messages is not one of its question's.
    asked = "question" in entry and not {"messages", "conversations"} & entry.keys() and "caption" not in entry
    said = [entry[key] for key in JOINED if key in entry and (asked or key in ("System", "system"))]
    said = [text.strip() for text in said if isinstance(text, str) and "<" not in text]  # markers are taken out
    return (
        len(files) > max(1, len(sample.images))
        or any(text not in texts and text not in str(entry.get("question")) for text in said)  # there already, a marker
        or entry.get("label") is False
        or entry.get("kto_tag") is False
        or any(entry.get("audio") == value for value in ("a.png", "plain", "user", 3))
    )


def is_file(name):
    return isinstance(name, str) and name.endswith(".png") and "://" not in name


def check(dataset, entries, *, beside=()):
    """One sample or one reason for each entry, in order; none that speaks of a picture is kept without one."""
    assert len(dataset) == len(dataset.sample_ids) == len(entries)
    assert len(set(dataset.sample_ids)) == len(entries)
    for index, entry in enumerate(entries):
        try:
            sample = dataset[index]
        except SampleError:
            continue
        assert sample.turns
        assert all(turn.answer.strip() for turn in sample.turns)
        assert not is_lossy(entry, sample), (entry, sample)
        if not sample.images:
            assert not speaks_of_a_picture(entry), (entry, sample)
    assert len(dataset.fingerprint()) == 32
    assert len(dataset.image_keys()) == len(entries)


RULES = settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@RULES
@given(made=st.lists(entries() | st.sampled_from(VALUES), min_size=1, max_size=3))
def test_a_json_list(tmp_path, made):
    (tmp_path / "a.png").write_bytes(PNG)
    path = tmp_path / "data.json"
    path.write_text(json.dumps([GOOD, *made]))
    check(LlavaDataset(path), json.loads(path.read_text()))


@RULES
@given(
    made=st.lists(entries() | st.sampled_from(VALUES), min_size=1, max_size=3),
    broken=st.sampled_from(["", "{", "\xff", "[1,", "nul"]),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-16-le"]),
)
def test_json_lines(tmp_path, made, broken, encoding):
    path = tmp_path / "data.jsonl"
    lines = [json.dumps(entry) for entry in [GOOD, *made]]
    path.write_text("\n".join([*lines, *([broken] if broken else [])]), encoding=encoding)
    check(MessagesDataset(path), [json.loads(line) for line in lines] + ([broken] if broken else []))


TAR_VALUES = [value for value in VALUES if value not in ("a.png", ["a.png"], {"path": "a.png"})]
EXTENSIONS = [
    "png",
    "JPG",
    "jfif",
    "tga",
    "bin",
    "json",
    "txt",
    "mp4",
    "input.png",
    "output.txt",
    "png.json",
    "0.png",
    "x",
    "",
]


@RULES
@given(
    made=st.lists(entries(TAR_VALUES), min_size=1, max_size=3),
    extensions=st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(EXTENSIONS)), max_size=6),
    cut=st.integers(0, 3),
)
def test_a_tar(tmp_path, made, extensions, cut):
    members = [("good.txt", b"fine")]
    for key, entry in zip("abc", made, strict=False):
        members += [(f"{key}.json", json.dumps(entry).encode())]
    for key, extension in extensions:
        data = {"json": b'{"width": 3}', "txt": b"a text"}.get(extension.rpartition(".")[2], PNG)
        members.append((f"{key}.{extension}" if extension else key, data))
    path = tmp_path / "data.tar"
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    if cut:
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) * cut // 4])
    try:
        dataset = WebDataset(str(path))
    except DataError:
        used = sum(512 + len(data) + -len(data) % 512 for _, data in members)
        assert (cut and path.stat().st_size < used + 512) or len({name for name, _ in members}) < len(members)
        return
    pictures = {name.partition(".")[0] for name, data in members if data is PNG and "." in name}
    for name, _ in members:
        assert any(name.startswith(f"{sample_id}.") for sample_id in dataset.sample_ids) or (
            f"data.tar:{name}" in dataset.sample_ids
        )
    for index, sample_id in enumerate(dataset.sample_ids):
        try:
            sample = dataset[index]
        except SampleError:
            continue
        if not sample.images:
            assert sample_id not in pictures
            entry = next((entry for key, entry in zip("abc", made, strict=False) if key == sample_id), {})
            assert not speaks_of_a_picture(entry), (sample_id, members)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    made=entries(),
    key=st.sampled_from(["image", "img", "anything"]),
    given_picture=st.sampled_from([None, PNG, b"junk"]),
)
def test_a_folder_of_datasets(tmp_path_factory, made, key, given_picture):
    datasets = pytest.importorskip("datasets")
    pyarrow = pytest.importorskip("pyarrow")
    datasets.disable_progress_bars()
    row = {"caption": None} | made | {key: {"bytes": given_picture, "path": None}}
    path = tmp_path_factory.mktemp("folder") / "saved"
    try:
        table = datasets.Dataset.from_list([row])
        features = table.features.copy()
        features[key] = datasets.Image()
        table.cast(features).save_to_disk(str(path))
    except (pyarrow.ArrowException, TypeError, ValueError, UnicodeError):
        return  # `datasets` cannot hold it
    check(HuggingFaceDataset(path), [row])
