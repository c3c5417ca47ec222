"""Where a teacher looked, as text and as a picture: equal to what the codec decodes, and legible everywhere."""

import numpy as np
import PIL.Image
import pytest
import torch
from cache_factory import make_plan
from click.testing import CliRunner

from vlm_distill_cache.common.cache.manifest import seal
from vlm_distill_cache.common.cache.plan import write_plan
from vlm_distill_cache.common.cache.stores import finish_shard, open_writer
from vlm_distill_cache.common.cli import main
from vlm_distill_cache.common.codecs.live import RowAttention
from vlm_distill_cache.common.codecs.row_attention import RowAttentionCodec
from vlm_distill_cache.common.errors import CacheFormatError
from vlm_distill_cache.common.pixels import image_hash
from vlm_distill_cache.common.tools.picture import ASCII, BLOCKS, WordMap, draw_picture, draw_text, word_maps
from vlm_distill_cache.common.tools.record_view import TokenText

GRID = (3, 4)


def attention(rows, groups=2, grid=GRID, seed=0):
    cells = torch.rand(rows, groups, grid[0] * grid[1], generator=torch.Generator().manual_seed(seed))
    return RowAttention.from_cells(cells / cells.sum(dim=-1, keepdim=True) * 0.6)


def record_of(codec, rows=3):
    return {**codec.encode(attention(rows)), "tiles": np.ones((1, 6), np.float32)}


def plan_of(codec):
    signals, fields = {codec.signal: codec.to_dict()}, {codec.signal: codec.fields()}
    return make_plan("webdataset", samples=1, shard_size=1, signals=signals, fields=fields)


@pytest.fixture
def cache(tmp_path):
    """One sample with an image whose answer looks at the top left cell only, and then at the bottom right one."""
    codec = RowAttentionCodec(grid=GRID, groups=1)
    plan = plan_of(codec)
    cells = torch.zeros(2, 1, 12)
    cells[0, 0, 0], cells[1, 0, 11] = 0.5, 0.25
    image = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 40, 3)).astype(np.uint8))
    image.save(tmp_path / "image.png")
    image.resize((20, 15)).save(tmp_path / "smaller.png")
    write_plan(tmp_path / "cache", plan)
    writer = open_writer(plan.store, tmp_path / "cache", 0, plan.all_fields)
    writer.append(
        "one",
        {
            "image_hash": np.frombuffer(image_hash(image), np.uint8).reshape(1, 16),
            "labels": np.array([7, 8], np.uint32),
            "tiles": np.array([[3, 4, 0, 0, 1, 1]], np.float32),
            **codec.encode(RowAttention.from_cells(cells)),
        },
    )
    finish_shard(writer)
    seal(tmp_path / "cache")
    return tmp_path / "cache"


def run(*arguments, code=0):
    result = CliRunner().invoke(main, ["inspect", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result.output


@pytest.mark.parametrize("exact", [False, True])
def test_cells_are_those_that_the_codec_decodes(exact):
    codec = RowAttentionCodec(grid=GRID, groups=2, exact=exact)
    record = record_of(codec)
    [found] = word_maps(record, plan_of(codec), [("ice", [0])])
    np.testing.assert_allclose(found.cells, codec.decode(record).cells[0].mean(axis=0).reshape(GRID), rtol=1e-6)


def test_a_word_of_several_tokens_is_their_mean_over_all_groups():
    codec = RowAttentionCodec(grid=GRID, groups=2, exact=True)
    record = record_of(codec)
    first, second = word_maps(record, plan_of(codec), [("ice", [0]), ("cream", [1, 2])])
    cells = record["answer_attention"].astype(np.float64)
    np.testing.assert_allclose(first.cells, cells[0].mean(axis=0).reshape(GRID))
    np.testing.assert_allclose(second.cells, cells[1:].mean(axis=(0, 1)).reshape(GRID))
    assert second.image_mass == pytest.approx(0.6, abs=1e-6)


def test_without_image_or_signal_there_is_nothing_to_draw():
    codec = RowAttentionCodec(grid=GRID, groups=2)
    record = record_of(codec) | {"tiles": np.zeros((0, 6), np.float32)}
    assert word_maps(record, plan_of(codec), [("x", [0])]) == []
    assert word_maps(record_of(codec), make_plan(), [("x", [0])]) == []
    assert draw_text([]) == []


def test_a_grid_that_is_not_that_of_the_arrays_is_refused():
    codec = RowAttentionCodec(grid=GRID, groups=2)

    def plan_with(grid):
        return make_plan(signals={codec.signal: codec.to_dict() | {"grid": grid}}, fields={codec.signal: ()})

    for grid in ([4, 4], [1 << 40, 1 << 40], "3x4", [12]):
        with pytest.raises(CacheFormatError, match=r"expected cells|signals\.answer_attention\.grid is .*; expected"):
            word_maps(record_of(codec), plan_with(grid), [("x", [0])])


@pytest.mark.parametrize("side", [1, 3, 6, 12, 24, 48])
@pytest.mark.parametrize("shades", [BLOCKS, ASCII])
def test_text_fits_a_hundred_columns_and_shows_the_largest_cell_darkest(side, shades):
    cells = np.full((side, side), 0.1 / side**2)
    cells[side - 1, 0] = 0.5
    lines = draw_text([WordMap(word="elephantine", cells=cells, image_mass=0.6)] * 9, shades=shades)
    assert max(map(len, lines)) <= 100
    text = "\n".join(lines)
    assert text.count(shades[4]) == 9 * (2 if side <= 16 else 1)
    assert all(line.count(shades[4]) for line in lines[side :: side + 2])  # in the last row of each block of maps
    assert text.count("60%") == 9


def test_an_empty_map_is_drawn_empty():
    [title, row] = draw_text([WordMap(word="x", cells=np.zeros((1, 3)), image_mass=0.0)], shades=ASCII)
    assert (title.split(), row) == (["x", "0%"], ". . .")
    sheet = draw_picture([WordMap(word="x", cells=np.zeros((1, 3)), image_mass=0.0)], title="t", image=None)
    assert sheet.mode == "RGB"


def test_a_picture_is_brightest_where_the_word_looked(tmp_path):
    cells = np.zeros((2, 2))
    cells[0, 1] = 0.5
    words = [WordMap(word="x" * 90, cells=cells, image_mass=0.5)] * 6
    sheet = np.asarray(draw_picture(words, title="t" * 500, image=None).convert("L"), np.float64)
    tile = sheet[-208:-8, 8:208]  # the last row holds one map
    assert tile[:100, 100:].mean() > 200 > 60 > tile[100:].mean()
    image = PIL.Image.new("RGB", (80, 40), (10, 200, 10))
    over = draw_picture(words[:1], title="t", image=image)
    assert over.size[1] < sheet.shape[0]
    assert over.getpixel((20, 90))[1] == 200  # the image itself comes first, in its own colours


def test_the_command_prints_and_draws_where_each_word_looked(cache, tmp_path):
    output = run(cache, "one")
    assert ["7", "50%", "8", "25%"] in [line.split() for line in output.splitlines()]
    assert "\u2588\u2588\u00b7 \u00b7 \u00b7" in output
    for _ in range(2):  # a later picture takes an earlier one's place
        assert f"Drew {tmp_path / 'a.png'}" in run(cache, "one", "--picture", tmp_path / "a.png")
        run(cache, "one", "--picture", tmp_path / "b.webp", "--image", tmp_path / "image.png")
    assert "no earlier result" in run(cache, "one", "--picture", tmp_path / "image.png", code=2)
    for name in ("a.png", "b.webp"):
        with PIL.Image.open(tmp_path / name) as image:
            assert min(image.size) > 200


def test_pictures_that_cannot_be_drawn_are_refused_with_the_reason(cache, tmp_path):
    output = run(cache, "one", "--picture", tmp_path / "a.png", "--image", tmp_path / "smaller.png", code=1)
    hashes = [image_hash(PIL.Image.open(tmp_path / name).convert("RGB")).hex() for name in ("smaller.png", "image.png")]
    assert f"its pixels have hash {hashes[0]}, the sample's image has {hashes[1]}" in output
    (tmp_path / "empty.png").write_bytes(b"")
    assert "is empty" in run(cache, "one", "--picture", tmp_path / "a.png", "--image", tmp_path / "empty.png", code=1)
    assert "written as .png or .webp" in run(cache, "one", "--picture", tmp_path / "a.exe", code=1)
    assert "--picture needs a SAMPLE_ID" in run(cache, "--picture", tmp_path / "a.png", code=2)
    assert "--image needs --picture" in run(cache, "one", "--image", tmp_path / "image.png", code=2)
    assert not (tmp_path / "a.png").exists()


def test_a_terminal_without_blocks_gets_ascii(cache, monkeypatch):
    result = CliRunner(charset="ascii").invoke(main, ["inspect", str(cache), "one"])
    assert result.exit_code == 0, result.output
    assert "##. . . " in result.output


def test_tokens_are_joined_into_words():
    pieces = {0: "</s>", 1: " ice", 2: "cream", 3: ".", 4: " It", 5: "'", 6: "s", 7: " 8"}
    text = TokenText(decode=lambda ids: "".join(pieces[i] for i in ids), special=frozenset({0}))
    words = text.words([1, 2, 3, 0, 4, 5, 6, 7, 0])
    assert words == [("icecream", [0, 1]), (".", [2]), ("It", [4]), ("'s", [5, 6]), ("8", [7])]
    level = TokenText(decode=lambda ids: " ".join(f"w{i}" for i in ids))  # as word-level tokenizers decode
    assert level.words([5, 6]) == [("w5", [0]), ("w6", [1])]
    numbers = TokenText(decode=lambda ids: " ".join(map(str, ids)))
    assert numbers.words([5, 66]) == [("5", [0]), ("66", [1])]


@pytest.mark.parametrize("kind", ["byte-level", "metaspace"])
def test_words_of_real_tokenizers_are_those_between_the_spaces(kind):
    """Byte-level pieces (GPT, SmolLM2) and sentencepiece ones (Llama), characters cut between tokens included."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    text = "A small café naïveté 漢字 stands left of it, isn't it?"
    tokenizer = Tokenizer(models.BPE(byte_fallback=kind == "metaspace"))
    if kind == "byte-level":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Sequence(
            [
                decoders.Replace("\u2581", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
        )
        alphabet = list("\u2581 abcdefghijklmnopqrstuvwxyzéïA漢字'?,")
    trainer = trainers.BpeTrainer(vocab_size=len(alphabet) + 12, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["small stands left of it"] * 9, trainer)
    ids = tokenizer.encode(text).ids
    words = TokenText(decode=tokenizer.decode).words(ids)
    expected = "A small café naïveté 漢 字 stands left of it , isn 't it ?"
    assert [word for word, _ in words] == expected.split()
    assert [row for _, rows in words for row in rows] == list(range(len(ids)))
