"""A token's text is its id only where a single token is written so."""

import pytest
from tiny_families import byte_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from vlm_distill_cache.common.errors import SampleError
from vlm_distill_cache.stage1_teacher.imports.words import TokenWords


def pieces_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of pieces as sentencepiece's are."""
    words = ["<unk>", "</s>", "▁dog", "dog", "▁a", "▁", "<0x0A>", "é"]
    tokenizer = Tokenizer(models.BPE({word: index for index, word in enumerate(words)}, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")


def test_every_token_of_a_byte_level_tokenizer_is_found_by_its_bytes():
    tokenizer = byte_tokenizer("<image>")
    words, letters = TokenWords(tokenizer), tokenizer.backend_tokenizer.pre_tokenizer
    for byte in range(256):
        token = tokenizer.convert_tokens_to_ids(letters.pre_tokenize_str(chr(byte))[0][0]) if byte < 128 else None
        found = words.id_of("\ufffd" if byte > 127 else chr(byte), [byte], "here")
        assert tokenizer.decode([found]) == (chr(byte) if byte < 128 else "\ufffd")
        assert token is None or found == token
    assert words.id_of("<image>", None, "here") == tokenizer.convert_tokens_to_ids("<image>")


def test_texts_that_several_tokens_are_written_as_are_refused():
    words = TokenWords(pieces_tokenizer())
    assert words.id_of("▁dog", None, "here") == 2
    assert words.id_of(" dog", None, "here") == 2
    assert words.id_of(" dog", list(b" dog"), "here") == 2
    assert words.id_of("\n", [10], "here") == 6
    assert words.id_of("</s>", None, "here") == 1
    assert words.id_of("token_id:3", None, "here") == 3
    with pytest.raises(
        SampleError,
        match=r"here: token 'dog' cannot be told, 2 of its tokens are written so; .*return_tokens_as_token_ids",
    ):
        words.id_of("dog", list(b"dog"), "here")  # what vLLM writes of both
    with pytest.raises(SampleError, match=r"token 'cat' cannot be told, no token of the teacher's tokenizer is"):
        words.id_of("cat", None, "here")
    with pytest.raises(SampleError, match=r"a token is 5, expected a text"):
        words.id_of(5, None, "here")


def test_halves_of_a_character_are_told_by_their_bytes_only():
    words = TokenWords(byte_tokenizer())
    with pytest.raises(SampleError, match="128 of its tokens"):
        words.id_of("\ufffd", list("\ufffd".encode()), "here")
