"""The built-in tokenizer and image processor: coverage, offsets, case, and the shipped files."""

import json

import numpy as np
import pytest
from PIL import Image
from transformers import AutoTokenizer

from vlm_distill_cache.data.builtin import (
    SPECIAL_TOKENS,
    build_tokenizer,
    load_image_processor,
    load_tokenizer,
    processor_directory,
    save_processor,
    vocabulary,
)
from vlm_distill_cache.data.shapes.dataset import ShapesDataset, shapes_evaluation

AB_PROMPT = (
    "Which caption best describes the image?\n(A) a red circle\n (B) a blue square\n"
    "Answer with the option's alphabet from the given choices directly."
)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


def assert_known(tokenizer, text):
    assert tokenizer.unk_token_id not in tokenizer(text)["input_ids"], text


def test_the_shipped_files_are_what_the_code_writes(tmp_path):
    save_processor(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
        assert json.loads((tmp_path / name).read_text()) == json.loads((processor_directory() / name).read_text()), name


def test_the_auto_class_loads_the_tokenizer(tokenizer):
    loaded = AutoTokenizer.from_pretrained(processor_directory())
    assert loaded.is_fast
    assert loaded(AB_PROMPT)["input_ids"] == tokenizer(AB_PROMPT)["input_ids"]


def test_special_tokens_have_fixed_ids(tokenizer):
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == [0, 1, 2, 3, 4]
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert tokenizer("USER: <image>\nx")["input_ids"].count(4) == 1
    assert len(tokenizer) == len(vocabulary()) == len(set(vocabulary()))


def test_all_texts_of_shapes_are_known_and_decode_to_themselves(tokenizer):
    dataset, evaluation = ShapesDataset("train", 100), shapes_evaluation("test", 60)
    texts = {text for i in range(100) for turn in dataset[i].turns for text in (turn.question, turn.answer)}
    texts |= {text for pair in evaluation.pairs for text in (pair.right, pair.wrong)}
    texts |= {text for q in evaluation.questions for text in (q.question, q.answer)}
    for text in texts:
        assert_known(tokenizer, text)
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_all_texts_of_easy_vqa_are_known():
    easy_vqa = pytest.importorskip("easy_vqa")
    tokenizer = load_tokenizer()
    for questions, answers, _ in (easy_vqa.get_train_questions(), easy_vqa.get_test_questions()):
        for text in {*questions, *answers}:
            assert_known(tokenizer, text)


def test_templates_and_the_option_prompt_are_known(tokenizer):
    assert_known(tokenizer, f"USER: <image>\n{AB_PROMPT} ASSISTANT: A</s>")
    assert_known(
        tokenizer,
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
        "helpful, detailed, and polite answers to the user's questions. USER: how many ASSISTANT: 3</s>",
    )


def test_offsets_point_at_the_characters_of_each_token(tokenizer):
    text = f"USER: <image>\n{AB_PROMPT} ASSISTANT: The c2 R4?</s>"
    encoded = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
    tokens = tokenizer.convert_ids_to_tokens(encoded["input_ids"])
    spans = [text[start:end] for start, end in encoded["offset_mapping"]]
    assert [span.lower() for span in spans] == [token.lower() for token in tokens]
    assert spans[-5:] == ["The", "c2", "R4", "?", "</s>"]


def test_case_is_ignored_but_option_letters_are_not_articles(tokenizer):
    assert tokenizer.tokenize("Is there a RED Circle?") == tokenizer.tokenize("is there a red circle?")
    assert tokenizer.tokenize("A red circle") == ["a", "red", "circle"]
    assert tokenizer.tokenize("(A) a red") == ["(", "A", ")", "a", "red"]
    assert len({tokenizer.convert_tokens_to_ids(letter) for letter in ("A", "a", "B", "C", "D", "<unk>")}) == 6
    assert tokenizer.decode(tokenizer("A")["input_ids"], skip_special_tokens=True) == "A"


def test_unknown_words_become_unk(tokenizer):
    assert tokenizer.tokenize("zebra") == ["<unk>"]
    assert build_tokenizer().tokenize("zebra") == ["<unk>"]


def test_the_image_processor_leaves_a_drawn_picture_as_it_is_and_squashes_others():
    processor = load_image_processor()
    picture = ShapesDataset("train", 1)[0].images[0].load()
    values = processor(picture)["pixel_values"][0]
    mean, std = (np.array(v, np.float32)[:, None, None] for v in (processor.image_mean, processor.image_std))
    expected = (np.asarray(picture, np.float32).transpose(2, 0, 1) / 255 - mean) / std
    np.testing.assert_allclose(values, expected, atol=1e-5)
    assert processor(Image.new("RGB", (64, 50)))["pixel_values"][0].shape == (3, 72, 72)
