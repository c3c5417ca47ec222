"""Which entry of a response belongs to which row, pinned by hand; and what is said where tokens differ."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fake_server import FakeServer
from tiny_families import byte_tokenizer, save_tiny

from vlm_distill_cache.common.errors import SampleError
from vlm_distill_cache.data.text.encoding import EncodedSample
from vlm_distill_cache.data.text.labels import Tokens, shift_labels
from vlm_distill_cache.stage1_teacher.imports.align import Aligner
from vlm_distill_cache.stage1_teacher.imports.forms import Reader
from vlm_distill_cache.stage1_teacher.imports.served import Served
from vlm_distill_cache.stage1_teacher.imports.words import TokenWords

IMAGE = 90
TOKENIZER = byte_tokenizer("<image>", bos=True)


def sample_of(ids: list[int], answers: list[int]) -> EncodedSample:
    """A sample of given ids, of which some places are an answer's."""
    array, is_answer = np.array(ids), np.zeros(len(ids), bool)
    is_answer[answers] = True
    return EncodedSample(
        sample_id="s", input_ids=array, labels=shift_labels(Tokens(ids=array, is_answer=is_answer)), visual_mask=array == IMAGE,
        position_ids=np.arange(len(ids)), segment_ids=np.zeros(2, np.int64), image_inputs={}, tiles=(), image_hashes=(),
    )  # fmt: skip


def aligner() -> Aligner:
    return Aligner(tokenizer=TOKENIZER, image_token_id=IMAGE, vocabulary=len(TOKENIZER))


def served(tokens: list[int | None], **options) -> Served:
    """A response whose distribution at a place is known by its own number: {place: 0.0}."""
    return Served(tokens=tokens, distribution=lambda place: {place: 0.0}, **options)


def places(sample: EncodedSample, response: Served) -> list[int]:
    return [next(iter(row)) for row in aligner().distributions(sample, response)]


def test_six_tokens_by_hand():
    # <s> USER: hi ASSISTANT: yes </s>: rows 3 and 4 predict yes and </s>, of which entries 4 and 5 tell how likely they were.
    ids = [1, 11, 12, 13, 14, 2]
    sample = sample_of(ids, [4, 5])
    assert sample.supervised_rows.tolist() == [3, 4]
    entries = [
        None,
        *(
            {str(token): {"logprob": -0.5, "rank": 1}, "77": {"logprob": -2.0 - place}}
            for place, token in enumerate(ids[1:])
        ),
    ]
    response = Reader(form="vllm", words=TokenWords(TOKENIZER)).read(
        {"prompt_token_ids": ids, "prompt_logprobs": entries}
    )
    assert aligner().distributions(sample, response) == [{14: -0.5, 77: -5.0}, {2: -0.5, 77: -6.0}]


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_a_picture_stands_for_a_picture_however_many_tokens_it_has(count: int):
    sample = sample_of([1, 10, IMAGE, IMAGE, IMAGE, 11, 12, 13], [6, 7])
    assert places(sample, served([1, 10, *[IMAGE] * count, 11, 12, 13])) == [3 + count, 4 + count]
    # SGLang's numbers for a picture's positions lie beyond the vocabulary, and it writes some of them as 0.
    beyond = [len(TOKENIZER) + 1_000_000] * count
    assert places(sample, served([1, 10, *beyond, 11, 12, 13])) == [3 + count, 4 + count]
    assert places(sample, served([1, 10, *[-200] * count, 11, 12, 13])) == [3 + count, 4 + count]
    zeros = served([1, 10, *[0] * count, 11, 12, 13], stand_ins=frozenset({0}))
    assert places(sample, zeros) == [3 + count, 4 + count]


def test_a_token_behind_the_picture_that_looks_like_one_of_it_is_told_from_it():
    sample = sample_of([1, IMAGE, IMAGE, 0, 11, 12], [4, 5])
    assert places(sample, served([1, 0, 0, 0, 11, 12], stand_ins=frozenset({0}))) == [4, 5]


def test_tokens_in_two_runs_of_a_picture():
    sample = sample_of([1, IMAGE, IMAGE, 9, IMAGE, IMAGE, 11, 12], [7])
    assert places(sample, served([1, IMAGE, 9, IMAGE, IMAGE, IMAGE, 11, 12])) == [7]


def test_what_stands_behind_the_answer_is_not_compared():
    sample = sample_of([1, 10, 11, 2, 30], [2, 3])
    assert places(sample, served([1, 10, 11, 2, 99, 98])) == [2, 3]
    assert places(sample, served([1, 10, 11, 2])) == [2, 3]


def test_an_unknown_token_agrees_with_any():
    assert places(sample_of([1, 10, 11, 2], [2, 3]), served([None, 10, 11, 2])) == [2, 3]


@pytest.mark.parametrize(
    ("tokens", "said"),
    [
        ([1, 10, 12, 2], r"differs at its token 2: 12 \('.'\), our token 2 is 11 \('.'\); .*template"),
        ([1, 1, 10, 11, 2], r"begins with 1 \('<s>'\) twice: .*add_special_tokens=false"),
        ([1, 10, 11], r"ends after 3 tokens, where the end of the answer should follow: 2 \('</s>'\)"),
        ([1, 10], r"ends after 2 tokens, where more should follow"),
        ([1, IMAGE, 10, 11, 2], r"differs at its token 1: the picture, our token 1 is 10 .*another picture, or none"),
        ([], "ends after 0 tokens"),
        ([1, -3, 11, 2], r"differs at its token 1: the picture, our"),
    ],
)
def test_the_first_difference_is_told(tokens: list[int], said: str):
    with pytest.raises(SampleError, match=said):
        places(sample_of([1, 10, 11, 2], [2, 3]), served(tokens))


def test_a_missing_picture_is_told():
    with pytest.raises(
        SampleError, match=r"token 1: 11 .* our token 1 is the picture; the server was given another picture"
    ):
        places(sample_of([1, IMAGE, IMAGE, 11, 12], [4]), served([1, 11, 12]))


def test_an_answer_alone_is_compared_with_the_answer():
    sample = sample_of([1, 10, 11, 12, 2], [2, 3, 4])
    assert places(sample, served([11, 12, 2], whole=False)) == [0, 1, 2]
    with pytest.raises(SampleError, match=r"ends after 2 tokens, where the end of the answer"):
        places(sample, served([11, 12], whole=False))
    with pytest.raises(
        SampleError, match=r"answer token 2 is 13 .* in the response, 12 .* must be those that were generated"
    ):
        places(sample, served([11, 13, 2], whole=False))
    with pytest.raises(SampleError, match="one generated answer, the sample has several"):
        places(sample_of([1, 10, 11, 12, 2], [2, 4]), served([11, 2], whole=False))


def test_generated_tokens_go_on_where_the_prompt_ends():
    sample = sample_of([1, 10, 11, 12, 2], [2, 3, 4])
    behind = Served(tokens=[11, 12, 2], distribution=lambda place: {100 + place: 0.0})
    response = replace(served([1, 10]), more=lambda: behind)
    assert places(sample, response) == [100, 101, 102]


def test_a_picture_in_front_begins_with_a_token_that_nothing_names():
    sample = sample_of([IMAGE, IMAGE, IMAGE, 10, 11, 2], [4, 5])
    assert places(sample, served([None, IMAGE, IMAGE, 10, 11, 2])) == [4, 5]
    with pytest.raises(SampleError, match="an unknown token"):
        places(sample_of([1, IMAGE, IMAGE, 11, 2], [3, 4]), served([1, None, None, 11, 2]))


def test_packed_questions_are_refused():
    sample = replace(sample_of([1, 10, 11, 2], [2, 3]), segment_ids=np.array([0, 1, 1, 2]))
    with pytest.raises(SampleError, match="independent questions about one picture"):
        places(sample, served([1, 10, 11, 2]))


def test_rows_without_log_probabilities_are_told():
    response = Served(tokens=[1, 10, 11, 2], distribution=lambda place: None)
    with pytest.raises(SampleError, match=r"no log-probabilities of token 2, 11 .*prompt_logprobs=K"):
        places(sample_of([1, 10, 11, 2], [2, 3]), response)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "smolvlm", "gemma3", "llava_next", "internvl"])
def test_pictures_of_every_family_align_with_their_own_prompts(name: str, tmp_path: Path, family_data: Path):
    server = FakeServer(save_tiny(name, tmp_path), family_data)
    found = Aligner(
        tokenizer=server.tokenizer, image_token_id=server.teacher.image_token_id, vocabulary=len(server.tokenizer)
    )
    for sample in server.samples:
        rows = found.distributions(sample, served(sample.input_ids.tolist()))
        assert [next(iter(row)) for row in rows] == [row + 1 for row in sample.supervised_rows]
