"""A tokenizer that is a ``tokenizer.model`` only gives the ids of the sentencepiece package, one by one."""

import itertools
import json
import pickle
import re
import shutil
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2
from sentencepiece_factory import KINDS, own, write_converted, write_model, write_settings
from test_encoding import make_encoder, make_sample

from vlm_distill_cache.common.errors import ModelError
from vlm_distill_cache.data.text.processors import load_tokenizer, tokenizer_fingerprint

HARD = [
    "", " ", "  ", "\n", "\t", "a", " a", "  a", "a ", "a  ", "in  it", "in   it    is     a      b", "a\nb", "a\n\nb\r\nc",
    "a\tb\t\tc", "naïve e\u0301t\u00e9 q\u0301\u0302",
    "ｶﾞ か\u3099 Ａ\u0301１", "中文 日本語", "🙂🙂 👩‍👩‍👧‍👦 🇩🇪", "\x00\x7f\u200b\ufeff\ufffd",
    "\u2581a\u2581\u2581b", "<sep>a<sep> b  <sep>", "<0x41> <ctl> <unused>", "\U0010ffff 𝒳", "x" * 300, " " * 40, "3.14159 10,000",
    "if (a):\n    return  b\n\n\n\tc", "USER: what is in  it? ASSISTANT: a red square",
]  # fmt: skip


def as_in_training(folder, text, *, legacy):
    """Slow reference: parts between special tokens, each read by sentencepiece; without legacy a blank at the front only."""
    ids, front = [], True
    for part in re.split(r"(</s>|<s>|<unk>)", text):
        if part in ("</s>", "<s>", "<unk>"):
            ids.append(own(folder).piece_to_id(part))
        elif part:
            ids += own(folder, **({} if legacy or front else {"add_dummy_prefix": False})).encode(part)
        front = front and not part
    return ids


@pytest.fixture(scope="module", params=list(KINDS))
def folder(request, tmp_path_factory):
    return write_model(tmp_path_factory.mktemp(request.param), request.param)


def check(folder, text):
    expected = own(folder)
    tokenizer = load_tokenizer(folder)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    assert encoded["input_ids"] == expected.encode(text), repr(text)
    return encoded["offset_mapping"]


def test_every_id_is_that_of_the_sentencepiece_package(folder):
    tokenizer, expected = load_tokenizer(folder), own(folder)
    assert tokenizer.is_fast
    assert tokenizer.get_vocab() == {expected.id_to_piece(index): index for index in range(len(expected))}
    for text in HARD:
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == expected.encode(text), repr(text)
        assert tokenizer(text)["input_ids"] == [1, *expected.encode(text)]


@pytest.mark.slow(quick=1)
def test_every_id_of_any_text_is_that_of_the_sentencepiece_package(folder):
    tokenizer, expected = load_tokenizer(folder), own(folder)
    letters = st.sampled_from([*"aeintsr13 \n\t.<>▁ガ中🙂", "  ", "   ", "e\u0301", "ｶﾞ", "<sep>", "in", "\r\n"])
    texts = st.lists(letters | st.characters(exclude_categories=["Cs"]), max_size=30).map("".join)

    @settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
    @given(texts)
    def holds(text):
        if re.search("</?s>|<unk>", text) is None:
            assert tokenizer(text, add_special_tokens=False)["input_ids"] == expected.encode(text)

    holds()


def test_characters_of_each_token_cover_the_text_in_order(folder):
    tokenizer = load_tokenizer(folder)
    text = "USER: what is in  it?\nASSISTANT: naïve 🙂 ｶﾞ 中文 three    four</s>USER: a red square"
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    assert all(0 <= start <= end <= len(text) for start, end in offsets)
    assert [start for start, _ in offsets] == sorted(start for start, _ in offsets)
    seen = set()
    for start, end in offsets:
        seen.update(range(start, end))
    assert {index for index in range(len(text)) if not text[index].isspace()} <= seen
    for word in ("ASSISTANT", "中文", "square", "</s>"):  # a token's own characters hold what it says
        at = text.index(word)
        inside = [(start, end) for start, end in offsets if start < at + len(word) and end > at]
        assert inside[0][0] in (at - 1, at)
        assert inside[-1][1] in (at + len(word), at + len(word) + 1)


@pytest.mark.parametrize("stated", [{"legacy": True}, {"legacy": False}, {}])
@pytest.mark.parametrize("kind", ["llama", "bpe-symbols", "unigram-bytes"])
def test_text_around_special_tokens_is_read_as_in_training(tmp_path, kind, stated):
    write_model(tmp_path, kind)
    write_settings(tmp_path, **stated)
    tokenizer = load_tokenizer(tmp_path)
    for text in (
        "a</s>b", "a </s> b", "</s>a", " </s>", "</s></s>", "a red  square</s>USER: what  is</s>\n in", "<s> a",
        "<unk>a<unk>", "  a</s>  b",
    ):  # fmt: skip
        expected = as_in_training(tmp_path, text, legacy=stated.get("legacy", True))
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == expected, text


def test_a_stored_tokenizer_reads_as_before_in_another_folder_and_process(folder, tmp_path):
    tokenizer = load_tokenizer(folder)
    tokenizer.save_pretrained(tmp_path)
    for again in (load_tokenizer(tmp_path), pickle.loads(pickle.dumps(tokenizer))):  # noqa: S301 - our own
        assert tokenizer_fingerprint(again) == tokenizer_fingerprint(tokenizer)
        for text in [*HARD, "a</s>b"]:
            assert again(text)["input_ids"] == tokenizer(text)["input_ids"], repr(text)


@st.composite
def settings_beside(draw, size):
    """Files beside a model of some pieces, as checkpoints have them, by name."""
    flag = st.booleans()
    described = {"lstrip": flag, "rstrip": flag, "single_word": flag, "special": flag, "normalized": flag}
    behind = draw(st.permutations(["<image>", "<pad>", "<|im_end|>"]))[: draw(st.integers(0, 3))]
    added = {word: size + n for n, word in enumerate(behind)}
    renamed = {"<|end|>": 2} if draw(flag) else {}
    ends = st.sampled_from([*(renamed or ["</s>"]), *added])
    tokenizer = {
        "tokenizer_class": "LlamaTokenizer", "unk_token": "<unk>", "eos_token": draw(ends),
        **draw(st.fixed_dictionaries({}, optional={
            "add_bos_token": flag, "add_eos_token": flag, "legacy": flag, "add_prefix_space": flag,
            "bos_token": st.sampled_from([None, "<s>"]), "pad_token": st.sampled_from([None, "<unk>", *added]),
        })),
    }  # fmt: skip
    if added and draw(flag):
        name = draw(st.sampled_from(["extra_special_tokens", "additional_special_tokens"]))
        tokenizer[name] = draw(st.lists(st.sampled_from([*added]), unique=True))
    stated = {**added, **renamed, **({} if renamed or draw(flag) else {"</s>": 2})}
    if draw(flag) or renamed or not added:
        decoder = {
            str(index): {"content": word, **draw(st.fixed_dictionaries(described))} for word, index in stated.items()
        }
        return {"tokenizer_config.json": {**tokenizer, "added_tokens_decoder": decoder}}
    named = {name: tokenizer.pop(name) for name in ("eos_token", "pad_token") if tokenizer.get(name)}
    flags = {name: {"content": word, **draw(st.fixed_dictionaries(described))} for name, word in named.items()}
    return {"tokenizer_config.json": tokenizer, "added_tokens.json": added, "special_tokens_map.json": flags}


@pytest.mark.slow(quick=1)
def test_a_stored_tokenizer_has_the_settings_that_it_was_made_with(folder, tmp_path_factory):
    names = [f"{name}_token_id" for name in ("bos", "eos", "unk", "pad")]

    @settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
    @given(settings_beside(len(own(folder))))
    def holds(beside):
        first, second, third = (tmp_path_factory.mktemp("stored") for _ in range(3))
        shutil.copy(folder / "tokenizer.model", first)
        for name, content in beside.items():
            (first / name).write_text(json.dumps(content))
        tokenizer = load_tokenizer(first)
        tokenizer.save_pretrained(second)
        load_tokenizer(second).save_pretrained(third)
        for place in (second, third):
            again = load_tokenizer(place)
            assert [getattr(again, name) for name in names] == [getattr(tokenizer, name) for name in names]
            assert again.added_tokens_decoder.keys() == tokenizer.added_tokens_decoder.keys()
            assert again.get_vocab() == tokenizer.get_vocab()
            assert tokenizer_fingerprint(again) == tokenizer_fingerprint(tokenizer)
            for text in (*HARD, "a<image> b </s> <pad>c<|im_end|> <|end|>\n<s>d", "a</s>b", "<image><pad>"):
                assert again(text)["input_ids"] == tokenizer(text)["input_ids"], repr(text)

    holds()


def test_what_is_stored_is_no_more_than_the_library_writes_where_that_says_all(tmp_path):
    write_model(tmp_path, "unigram")
    load_tokenizer(tmp_path).save_pretrained(tmp_path / "stored")
    stored = json.loads((tmp_path / "stored" / "tokenizer_config.json").read_text())
    assert not {"added_tokens_decoder", "add_bos_token", "add_eos_token"} & stored.keys()


def test_text_of_ids_is_the_text(folder):
    tokenizer = load_tokenizer(folder)
    text = "a red square, what is it"
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True).strip() == text


def test_padding_and_tensors_are_the_librarys(folder):
    tokenizer = load_tokenizer(folder)
    tokenizer.pad_token = "<unk>"
    batch = tokenizer(["a red square", "a"], padding=True, return_tensors="pt")
    assert batch["input_ids"].shape == batch["attention_mask"].shape
    assert batch["attention_mask"].sum(1).tolist() == [
        len(tokenizer(text)["input_ids"]) for text in ("a red square", "a")
    ]
    cut = tokenizer("a red square", max_length=2, truncation=True)["input_ids"]
    assert cut == tokenizer("a red square")["input_ids"][:2]


def test_special_tokens_come_from_any_of_the_three_files(tmp_path):
    write_model(tmp_path)
    size = len(own(tmp_path))
    (tmp_path / "tokenizer_config.json").unlink()
    described = {"content": "</s>", "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": described, "pad_token": "<pad>"}))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<image>": size, "<pad>": size + 1}))
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, size + 1)
    assert tokenizer("a.</s>")["input_ids"] == [1, *own(tmp_path).encode("a."), 2]
    assert tokenizer("<image>", add_special_tokens=False)["input_ids"] == [size]
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<image>": size + 5}))
    with pytest.raises(ModelError, match=r"give token '<image>' the id \d+, behind the \d+ pieces"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(("bos", "eos"), [(True, True), (False, True), (False, False)])
def test_tokens_around_a_text_are_those_that_the_settings_ask_for(folder, bos, eos):
    tokenizer = load_tokenizer(folder)
    before = (folder / "tokenizer_config.json").read_text()
    write_settings(folder, add_bos_token=bos, add_eos_token=eos)
    try:
        expected = [*[1] * bos, *tokenizer("a b", add_special_tokens=False)["input_ids"], *[2] * eos]
        assert load_tokenizer(folder)("a b")["input_ids"] == expected
    finally:
        (folder / "tokenizer_config.json").write_text(before)


def test_a_published_tokenizer_json_of_the_same_model_has_the_same_fingerprint(tmp_path):
    mine = load_tokenizer(write_model(tmp_path))
    for name, config in (
        ("llama", {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": True}),
        ("legacy", {"tokenizer_class": "LlamaTokenizer", "legacy": True, "add_bos_token": True}),
        ("any", {"tokenizer_class": "PreTrainedTokenizerFast"}),
    ):
        theirs = load_tokenizer(write_converted(tmp_path / name, tmp_path, **config))
        assert tokenizer_fingerprint(theirs) == tokenizer_fingerprint(mine), name
        for text in ("in  it", "a   b    c\n  d", "USER: what is in  it? ASSISTANT: naïve 🙂"):
            assert theirs(text)["input_ids"] == mine(text)["input_ids"]


def test_a_tokenizer_json_beside_a_model_is_used_as_it_is(tmp_path):
    write_model(tmp_path, "llama")
    load_tokenizer(tmp_path).save_pretrained(tmp_path / "stored")
    (tmp_path / "stored" / "tokenizer.model").write_bytes(b"not looked at")
    assert load_tokenizer(tmp_path / "stored")("in  it")["input_ids"] == load_tokenizer(tmp_path)("in  it")["input_ids"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: b"", r"tokenizer\.model: 0 bytes that are no whole|0 bytes, 0 pieces"),
        (lambda content: content[: len(content) // 2], r"tokenizer\.model: \d+ bytes"),
        (lambda content: content[:-20], r"tokenizer\.model: \d+ bytes"),
        (
            lambda content: b"<html>not found</html>",
            r"tokenizer\.model: 22 bytes that are no whole sentencepiece model",
        ),
        (lambda content: b"version https://git-lfs.github.com/spec/v1\n", r"no whole sentencepiece model"),
    ],
)
def test_a_damaged_model_is_refused_by_name(tmp_path, damage, message):
    write_model(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(damage((tmp_path / "tokenizer.model").read_bytes()))
    with pytest.raises(ModelError, match=message):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("kind", ["word", "char"])
def test_a_model_of_another_type_is_refused(tmp_path, kind):
    write_model(tmp_path, "bpe", model_type=kind)
    with pytest.raises(
        ModelError, match=r"of type [34] \(3: words, 4: characters\), expected 1 \(unigram\) or 2 \(BPE\)"
    ):
        load_tokenizer(tmp_path)


def test_a_model_cut_between_two_fields_is_refused(tmp_path):
    write_model(tmp_path)
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString((tmp_path / "tokenizer.model").read_bytes())
    proto.ClearField("normalizer_spec")
    (tmp_path / "tokenizer.model").write_bytes(proto.SerializeToString())
    with pytest.raises(ModelError, match=r"cut off|no whole sentencepiece model"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("lengths", [range(2, 17), (2, 4, 8, 16), (2, 3, 5)])
@pytest.mark.parametrize("tied", [True, False])
def test_runs_of_blanks_with_scores_below_all_others_are_cut_as_in_llama(tmp_path, lengths, tied):
    """Llama's pieces of nothing but blanks merge last, and their scores are so low that float32 holds them as one."""
    write_model(tmp_path, "llama")
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString((tmp_path / "tokenizer.model").read_bytes())
    for index, length in enumerate(lengths):
        proto.pieces.add(piece="▁" * length, score=-1e9 if tied else -1e6 - index, type=1)
    (tmp_path / "tokenizer.model").write_bytes(proto.SerializeToString())
    tokenizer, expected = load_tokenizer(tmp_path), own(tmp_path)
    for count in range(1, 70):
        for text in (
            "a" + " " * count + "b",
            " " * count,
            "\n" + " " * count + "if (a)",
            " " * count + "\n" + " " * count,
        ):
            assert tokenizer(text, add_special_tokens=False)["input_ids"] == expected.encode(text), repr(text)


def test_a_plain_model_is_stored_as_a_tokenizer_json_and_others_as_they_are(folder, tmp_path):
    plain = folder.name.startswith(("llama", "bpe-no-prefix", "bpe-unknown"))
    load_tokenizer(folder).save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").is_file() == plain
    assert (tmp_path / "tokenizer.model").is_file() == (not plain)


def test_pieces_of_one_score_are_found_where_sentencepiece_finds_them(tmp_path):
    """Vocabularies that were extended by hand give all their new pieces the score 0."""
    write_model(tmp_path, "llama")
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString((tmp_path / "tokenizer.model").read_bytes())
    for piece in ("中文", "文日", "日本", "本語", "日本語"):
        if piece not in {other.piece for other in proto.pieces}:
            proto.pieces.add(piece=piece, score=0.0, type=1)
    (tmp_path / "tokenizer.model").write_bytes(proto.SerializeToString())
    for text in ("中文日本語中文", "文日本語日本", "a中文 日本"):
        check(tmp_path, text)


def test_a_model_without_the_package_says_what_to_install(tmp_path, monkeypatch):
    write_model(tmp_path)
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(
        ModelError, match=r"needs sentencepiece and protobuf .*`make setup` or `pip install sentencepiece"
    ):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("image", [True, False])
@pytest.mark.parametrize("legacy", [True, False])
def test_answers_are_found_in_a_conversation(folder, tmp_path, image, legacy):
    """Also where the normaliser changes the number of characters: what is supervised is the answers' own tokens."""
    shutil.copy(folder / "tokenizer.model", tmp_path)
    write_settings(tmp_path, legacy=legacy)
    tokenizer, sp = load_tokenizer(tmp_path), own(tmp_path)
    turns = [("ｶﾞｶﾞ what  is it?", "a red square"), ("is  it\n\n３?", "three, four  five"), ("ﬁ ①", "return  b")]
    encoded = make_encoder(tokenizer, "vicuna_v1", image_token_id=len(sp))(make_sample(*turns, image=image))
    labels = encoded.labels[encoded.supervised_rows].tolist()
    answers = [list(group) for key, group in itertools.groupby(labels, lambda token: token == 2) if not key]
    assert labels.count(2) == len(turns)
    # A token that holds the colon and the blank behind it straddles the beginning, and belongs to the answer.
    assert [sp.decode(ids).strip(": ") for ids in answers] == [
        sp.decode(sp.encode(answer)).strip() for _, answer in turns
    ]
    assert encoded.visual_mask.sum() == (6 if image else 0)
