"""Parquet: the same entries as reading the whole file at once gives, whatever the row groups and the order."""

import io
import multiprocessing
import pickle

import PIL.Image
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vlm_distill_cache.common.errors import DataError, SampleError
from vlm_distill_cache.data.registry import open_dataset
from vlm_distill_cache.data.sample import Turn
from vlm_distill_cache.data.sources import parquet_rows
from vlm_distill_cache.data.sources.parquet import LocalParquet, ParquetDataset, label_names, picture_columns
from vlm_distill_cache.data.sources.parquet_rows import ParquetRows, StoredPicture

datasets = pytest.importorskip("datasets")
pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.new("RGB", (4 + number % 7, 4), (number % 255, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


PICTURE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def write(path, columns, *, group=3, types=(), features=None):
    arrays = {name: pa.array(values, dict(types).get(name)) for name, values in columns.items()}
    table = pa.table(arrays)
    if features is not None:
        table = table.replace_schema_metadata(features.arrow_schema.metadata)
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=group)
    return path


def plain(value):
    """A row with the bytes of its pictures, as `to_pylist` gives it."""
    if isinstance(value, StoredPicture):
        return value.read()
    if isinstance(value, list):
        return [plain(item) for item in value]
    return value


def reference(value):
    if isinstance(value, dict) and set(value) == {"bytes", "path"}:
        return value["bytes"]
    return [reference(item) for item in value] if isinstance(value, list) else value


def rows_of(path):
    return ParquetRows([LocalParquet(path)], pictures=picture_columns, labels=label_names)


one = st.none() | st.integers(0, 9)
stored = st.sampled_from(["all", "none", "paths", "nothing"])


@st.composite
def tables(draw):
    """Columns of texts and of pictures of every storage, with rows and pictures missing here and there."""
    count = draw(st.integers(1, 12))

    def picture(number, how):
        if number is None:
            return None
        return {
            "bytes": None if how in ("paths", "nothing") else png(number),
            "path": None if how == "nothing" else f"{number}.png",
        }

    how = draw(st.lists(stored, min_size=count, max_size=count)) if draw(st.booleans()) else ["all"] * count
    return {
        "question": draw(st.lists(st.none() | st.text(max_size=4), min_size=count, max_size=count)),
        "image": [picture(draw(one), how[i]) for i in range(count)],
        "images": [
            draw(st.none() | st.lists(one, max_size=3).map(lambda ns, i=i: [picture(n, how[i]) for n in ns]))
            for i in range(count)
        ],
    }


@given(tables(), st.integers(1, 5), st.integers(1, 400), st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_rows_in_any_order_equal_those_of_the_whole_file(tmp_path, columns, group, block, random):
    path = write(
        tmp_path / "x.parquet",
        columns,
        group=group,
        types=[("image", PICTURE), ("images", pa.list_(PICTURE)), ("question", pa.string())],
    )
    expected = pq.read_table(path).to_pylist()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parquet_rows, "BLOCK_BYTES", block)  # row groups are cut into blocks of one row and of several
        patch.setattr(parquet_rows, "KEPT_BYTES", block)
        rows = rows_of(path)
        places = list(range(len(expected))) * 2
        random.shuffle(places)
        for place in places:
            row = rows.row(place)
            for name in columns:
                found, wanted = row[name], expected[place][name]
                if isinstance(found, StoredPicture) or (
                    isinstance(found, list) and any(isinstance(item, StoredPicture) for item in found)
                ):
                    assert plain(found) == reference(wanted)
                else:
                    assert found == wanted
            assert list(row) == list(columns)


def test_texts_are_read_without_the_pictures_beside_them(tmp_path):
    count = 30
    columns = {"image": [{"bytes": png(i), "path": None} for i in range(count)], "caption": ["a"] * count}
    dataset = open_dataset(str(write(tmp_path / "x.parquet", columns, types=[("image", PICTURE)])))
    dataset.fingerprint()
    kinds = {kind for _, kind, _ in dataset._table.rows._own.blocks}
    assert kinds == {parquet_rows.TEXTS}
    assert dataset[7].images[0].load().size == (4, 4)
    assert {kind for _, kind, _ in dataset._table.rows._own.blocks} == {parquet_rows.TEXTS, "image"}


def test_memory_is_bounded_whatever_is_read(tmp_path, monkeypatch):
    columns = {"image": [png(i) * 50 for i in range(40)], "caption": ["a"] * 40}
    dataset = open_dataset(str(write(tmp_path / "x.parquet", columns, group=40)))
    monkeypatch.setattr(parquet_rows, "KEPT_BYTES", 30_000)
    monkeypatch.setattr(parquet_rows, "BLOCK_BYTES", 10_000)
    dataset = open_dataset(str(tmp_path / "x.parquet"))
    for index in [*range(40), 3, 39, 0]:
        assert dataset[index].images[0].read() == png(index) * 50
        own = dataset._table.rows._own
        assert own.size == sum(block.nbytes for block in own.blocks.values())
        assert own.size <= 30_000 + 20_000


def _read(dataset, index, queue):
    queue.put((dataset[index].turns[0].answer, dataset[index].images[0].load().size))


def test_a_pickled_copy_and_a_forked_process_read_the_same(tmp_path):
    columns = {"image": [{"bytes": png(i), "path": None} for i in range(9)], "caption": [f"c{i}" for i in range(9)]}
    dataset = open_dataset(str(write(tmp_path / "x.parquet", columns, types=[("image", PICTURE)])))
    expected = (dataset[5].turns[0].answer, dataset[5].images[0].load().size)
    copy = pickle.loads(pickle.dumps(dataset))  # noqa: S301
    assert (copy[5].turns[0].answer, copy[5].images[0].load().size) == expected
    assert pickle.loads(pickle.dumps(dataset[5])).images[0].load().size == expected[1]  # noqa: S301
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    with dataset._table.rows._own.lock:  # as if another thread were reading
        process = context.Process(target=_read, args=(dataset, 5, queue))
        process.start()
        assert queue.get(timeout=60) == expected
    process.join()


FEATURES = datasets.Features(
    {
        "id": datasets.Value("string"),
        "photograph": datasets.Image(),
        "question": datasets.Value("string"),
        "answer": datasets.ClassLabel(names=["no", "yes"]),
    }
)


def test_types_that_datasets_wrote_say_what_a_column_is(tmp_path):
    columns = {
        "id": ["a", "b", "c"],
        "photograph": [{"bytes": png(1), "path": None}, {"bytes": png(2), "path": "x.png"}, None],
        "question": ["Is it?"] * 3,
        "answer": [1, 0, None],
    }
    path = write(tmp_path / "x.parquet", columns, types=[("photograph", PICTURE)], features=FEATURES)
    dataset = open_dataset(str(path))
    assert list(dataset.sample_ids) == ["a", "b", "c"]
    assert [dataset[i].turns for i in (0, 1)] == [(Turn(question="Is it?", answer=a),) for a in ("yes", "no")]
    assert dataset[1].images[0].load().size == (6, 4)
    with pytest.raises(SampleError, match="sample 'c'"):
        dataset[2]


def test_a_table_of_datasets_and_its_parquet_files_are_the_same_data(tmp_path):
    datasets.disable_progress_bars()
    columns = {
        "id": [str(i) for i in range(10)],
        "photograph": [{"bytes": png(i), "path": None} for i in range(10)],
        "question": ["Is it?"] * 10,
        "answer": [i % 2 for i in range(10)],
    }
    table = datasets.Dataset.from_dict(columns, features=FEATURES)
    table.save_to_disk(str(tmp_path / "saved"))
    table.to_parquet(tmp_path / "x.parquet", batch_size=4)
    saved, parquet = open_dataset(str(tmp_path / "saved")), open_dataset(str(tmp_path / "x.parquet"))
    assert saved.fingerprint() == parquet.fingerprint()
    for one_sample, other in zip(saved, parquet, strict=True):
        assert one_sample.turns == other.turns
        assert one_sample.images[0].load().tobytes() == other.images[0].load().tobytes()


def test_the_same_picture_under_two_keys_counts_once_and_two_pictures_are_refused(tmp_path):
    def picture(number):
        return {"bytes": png(number), "path": None}

    columns = {"image": [picture(1), picture(1)], "images": [[picture(1)], [picture(2)]], "caption": ["a", "b"]}
    types = [("image", PICTURE), ("images", pa.list_(PICTURE))]
    dataset = open_dataset(str(write(tmp_path / "x.parquet", columns, types=types)))
    assert len(dataset[0].images) == 1
    assert len(dataset[1].images) == 2  # refused when it is encoded


@pytest.mark.parametrize("images", [None, "pictures"])
def test_paths_start_from_the_file_or_the_image_folder(tmp_path, images):
    root = tmp_path / (images or ".")
    root.mkdir(exist_ok=True)
    (root / "a.png").write_bytes(png(3))
    for column, values in (
        ("image", ["a.png"]),
        ("image", [{"bytes": None, "path": "a.png"}]),
        ("images", [["a.png"]]),
    ):
        path = write(tmp_path / "x.parquet", {column: values, "caption": ["a"]})
        dataset = open_dataset(str(path), images=None if images is None else root)
        assert dataset[0].images[0].load().size == (7, 4)


def rows(*texts):
    return {"question": [f"q{t}" for t in texts], "answer": [f"a{t}" for t in texts]}


def answers(dataset):
    return [sample.turns[0].answer for sample in dataset]


def test_folders_as_the_hub_serves_them(tmp_path):
    for number in (0, 1):
        write(tmp_path / "data" / f"train-0000{number}-of-00002.parquet", rows(number))
    write(tmp_path / "data" / "test-00000-of-00001.parquet", rows("t"))
    assert answers(open_dataset(str(tmp_path))) == ["a0", "a1"]
    assert answers(open_dataset(str(tmp_path), split="test")) == ["at"]
    assert answers(open_dataset(str(tmp_path), split="validation")) == ["a0", "a1"]  # as of a file: there is no such
    assert answers(open_dataset(f"{tmp_path}:split=test")) == ["at"]
    assert answers(open_dataset(str(tmp_path / "data"))) == ["a0", "a1"]
    assert list(open_dataset(str(tmp_path)).sample_ids) == ["row-00000000", "row-00000001"]
    with pytest.raises(DataError, match=r"no split 'validation'; it has test, train: name one, DATA=.*:split=train"):
        open_dataset(f"{tmp_path}:split=validation")


def test_the_hubs_own_conversion_is_read_by_its_folders(tmp_path):
    for config in ("default", "other"):
        write(tmp_path / config / "train" / "0000.parquet", rows(config))
        write(tmp_path / config / "train" / "0001.parquet", rows(f"{config}2"))
    write(tmp_path / "default" / "val2014" / "0000.parquet", rows("v"))
    assert answers(open_dataset(str(tmp_path))) == ["adefault", "adefault2"]
    assert answers(open_dataset(f"{tmp_path}:name=other")) == ["aother", "aother2"]
    assert answers(open_dataset(f"{tmp_path}:split=val2014")) == ["av"]
    assert answers(open_dataset(str(tmp_path / "other"))) == ["aother", "aother2"]
    with pytest.raises(DataError, match="no data set 'more'; it has default, other: name one"):
        open_dataset(f"{tmp_path}:name=more")


README = """---
configs:
- config_name: charts
  data_files:
  - split: train
    path: charts/*
  - split: held
    path: more/c*
- config_name: texts
  data_files: texts/*.parquet
---
"""


def test_readme_says_which_files_belong_together(tmp_path):
    (tmp_path / "README.md").write_text(README)
    for place in ("charts/one", "charts/two", "more/c", "texts/x"):
        write(tmp_path / f"{place}.parquet", rows(place))
    assert answers(open_dataset(f"{tmp_path}:name=charts")) == ["acharts/one", "acharts/two"]
    assert answers(open_dataset(f"{tmp_path}:name=charts,split=held")) == ["amore/c"]
    assert answers(open_dataset(f"{tmp_path}:name=texts")) == ["atexts/x"]
    with pytest.raises(DataError, match=r"several data sets; it has charts, texts: name one, DATA=.*:name=charts"):
        open_dataset(str(tmp_path))


def test_a_part_of_a_repository_with_its_whole_readme_is_read(tmp_path):
    (tmp_path / "README.md").write_text(README)
    write(tmp_path / "charts" / "one.parquet", rows("x"))
    assert answers(open_dataset(f"{tmp_path}:name=charts")) == ["ax"]
    assert answers(open_dataset(f"{tmp_path}:name=charts", split="test")) == ["ax"]
    with pytest.raises(DataError, match="no split 'held'; it has train"):
        open_dataset(f"{tmp_path}:name=charts,split=held")


def test_a_folder_of_a_subset_is_named_without_a_readme(tmp_path):
    for subset in ("ai2d", "chartqa"):
        write(tmp_path / subset / "train-00000-of-00001.parquet", rows(subset))
    assert answers(open_dataset(f"{tmp_path}:name=ai2d")) == ["aai2d"]


def test_patterns_are_expanded_in_order(tmp_path):
    for number in range(3):
        write(tmp_path / f"x{number}.parquet", rows(number))
    assert answers(open_dataset(str(tmp_path / "x*.parquet"))) == ["a0", "a1", "a2"]
    assert answers(open_dataset(str(tmp_path / "x{2,0}.parquet"))) == ["a2", "a0"]
    assert answers(open_dataset(str(tmp_path))) == ["a0", "a1", "a2"]
    with pytest.raises(DataError, match=r"no parquet at .*x7\.parquet"):
        open_dataset(str(tmp_path / "x7.parquet"))


def test_what_is_no_parquet_file_is_refused_in_one_line(tmp_path):
    whole = write(tmp_path / "x.parquet", rows(*range(50))).read_bytes()
    for content, message in (
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "Git LFS pointer.*git lfs pull"),
        (b"hello", "cannot be read as parquet.*copy or download it again"),
        (whole[: len(whole) // 2], "cannot be read as parquet.*copy or download it again"),
        (whole[:-4] + b"XXXX", "cannot be read as parquet"),
    ):
        (tmp_path / "x.parquet").write_bytes(content)
        with pytest.raises(DataError, match=message) as caught:
            open_dataset(str(tmp_path / "x.parquet"))
        assert "\n" not in str(caught.value)
        assert str(caught.value).count("download") <= 1 or "git lfs" in str(caught.value)
        assert "x.parquet" in str(caught.value)


def test_a_damaged_row_group_is_its_samples_error(tmp_path):
    path = write(tmp_path / "x.parquet", {"id": list("abcd"), **rows(*range(4))}, group=2)
    place = pq.ParquetFile(path).metadata.row_group(1).column(1)
    data = bytearray(path.read_bytes())
    start = place.data_page_offset if place.dictionary_page_offset is None else place.dictionary_page_offset
    data[start : start + 20] = b"\xff" * 20
    path.write_bytes(data)
    dataset = open_dataset(str(path))
    assert answers([dataset[0], dataset[1]]) == ["a0", "a1"]
    with pytest.raises(SampleError, match=r"sample 'c': .*row group 1, cannot be read as parquet"):
        dataset[2]


def test_files_of_other_columns_or_types_are_refused_by_name(tmp_path):
    write(tmp_path / "a.parquet", rows(1))
    write(tmp_path / "b.parquet", {"caption": ["x"]})
    with pytest.raises(
        DataError, match=r"b\.parquet has other columns than .*a\.parquet: it lacks answer, question and has"
    ):
        open_dataset(str(tmp_path))
    write(tmp_path / "b.parquet", {"question": ["q"], "answer": [["x"]]})
    with pytest.raises(DataError, match=r"b\.parquet has other columns.*'answer' is list.*expected string"):
        open_dataset(str(tmp_path))
    # A width, or a column in which nothing stands, makes no other data.
    write(tmp_path / "b.parquet", {"answer": [None], "question": ["q"]})
    assert len(open_dataset(str(tmp_path))) == 2


FIELDS = [("bytes", pa.binary()), ("path", pa.string())]
MESSAGE = [("role", pa.string()), ("content", pa.string()), ("name", pa.string())]


def narrowed(draw, fields, always):
    """A struct of some of the fields, in any order, of which some have no type as nothing stands in them."""
    kept = [field for field in fields if field[0] in always or draw(st.booleans())]
    ordered = draw(st.permutations(kept))
    return pa.struct([(n, kind if n in always or draw(st.booleans()) else pa.null()) for n, kind in ordered])


@given(st.data(), st.integers(1, 3))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_files_written_apart_differ_in_what_stands_in_none_of_a_ones_rows(tmp_path, data, group):
    files = []
    for number in range(3):
        picture = narrowed(data.draw, FIELDS, {"bytes"})
        message = narrowed(data.draw, MESSAGE, {"role", "content"})
        talk = [{"role": "user", "content": f"q{number}"}, {"role": "assistant", "content": f"a{number}"}]
        kinds = {"image": pa.null() if data.draw(st.booleans()) else picture, "messages": pa.list_(message)}
        images = [None if pa.types.is_null(kinds["image"]) else {"bytes": png(number)}] * 2
        path = tmp_path / f"{number}.parquet"
        files.append(write(path, {"image": images, "messages": [talk] * 2}, types=kinds.items(), group=group))
    rows = ParquetRows(list(map(LocalParquet, files)), pictures=picture_columns, labels=label_names)
    for index in reversed(range(6)):
        alone = rows_of(files[index // 2]).row(index % 2)
        assert plain(rows.row(index)["messages"]) == alone["messages"]
        assert plain(rows.row(index)["image"]) == reference(plain(alone["image"]))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (pa.list_(pa.struct(MESSAGE)), pa.list_(pa.struct([("from", pa.string()), ("value", pa.string())]))),
        (pa.struct(FIELDS), pa.struct([("bytes", pa.string())])),
        (pa.list_(pa.string()), pa.list_(pa.list_(pa.string()))),
        (pa.list_(pa.string()), pa.string()),
        (pa.string(), pa.int64()),
        (pa.dictionary(pa.int8(), pa.string()), pa.int8()),
    ],
)
def test_other_types_within_a_column_are_refused(tmp_path, one, other):
    for name, kind in (("a", one), ("b", other)):
        write(tmp_path / f"{name}.parquet", rows(1) | {"more": [None]}, types=[("more", kind)])
    with pytest.raises(DataError, match=r"b\.parquet has other columns than .*a\.parquet: 'more' is .*, expected"):
        open_dataset(str(tmp_path))


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("names", [("dog", "cat"), ("cat", "dog", "cow"), None])
def test_a_label_that_means_something_else_in_another_file_is_refused(tmp_path, names, several):
    def labelled(number, names):
        described = datasets.Features({"question": datasets.Value("string")})
        kind = datasets.Value("int64") if names is None else datasets.ClassLabel(names=list(names))
        described["answers" if several else "answer"] = [kind] if several else kind
        answer = {"answers": [[0]]} if several else {"answer": [0]}
        place = tmp_path / f"train-0000{number}-of-00003.parquet"
        return write(place, {"question": [f"q{number}"], **answer}, features=described)

    for number in range(2):
        labelled(number, ("cat", "dog"))
    third = labelled(2, ("cat", "dog"))
    assert answers(open_dataset(str(tmp_path))) == ["cat"] * 3
    labelled(2, names)
    with pytest.raises(
        DataError, match=rf"{third.name} has .*labels.* for column 'answers?', .*00000-of-00003.parquet has"
    ):
        open_dataset(str(tmp_path))


def test_no_row_and_missing_files_are_refused(tmp_path):
    write(tmp_path / "x.parquet", {"question": [], "answer": []}, types=[("question", pa.string())])
    with pytest.raises(DataError, match="no row in 1 parquet files"):
        open_dataset(str(tmp_path / "x.parquet"))
    write(tmp_path / "d" / "train-00001-of-00003.parquet", rows(1))
    with pytest.raises(DataError, match="2 of 3 files are missing, the first is train-00000-of-00003"):
        open_dataset(str(tmp_path / "d"))


def test_columns_without_text_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"expected columns .* it has \['image', 'label'\]"):
        open_dataset(str(write(tmp_path / "x.parquet", {"image": [png(1)], "label": [1]})))


def test_without_the_extra_it_is_named(tmp_path, monkeypatch):
    path = write(tmp_path / "x.parquet", rows(1))
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.types", None)
    with pytest.raises(DataError, match=r"needs an extra: pip install 'vlm-distill-cache\[hf\]'"):
        ParquetDataset([LocalParquet(path)], name="x", where="x", image_root=tmp_path)


@pytest.mark.parametrize("nested", [False, True])
def test_values_that_a_file_holds_once_are_held_once(tmp_path, monkeypatch, nested):
    monkeypatch.setattr(parquet_rows, "KEPT_BYTES", 1_000_000)
    texts = ["q" * 10_000 + str(i % 3) for i in range(2000)]
    columns = {"image": [png(0)] * 2000, "caption": [[text] for text in texts] if nested else texts}
    rows = parquet_rows.ParquetRows(
        [LocalParquet(write(tmp_path / "x.parquet", columns, group=2000))],
        pictures=lambda schema: (),
        labels=lambda schema: {},
    )
    assert [rows.row(index)["caption"] for index in (0, 1999, 7)] == [columns["caption"][i] for i in (0, 1999, 7)]
    assert rows._own.size < 200_000
    assert nested or rows.column("caption") == texts
