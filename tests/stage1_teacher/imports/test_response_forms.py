"""Every form says the same of the same tokens; whatever else a response holds is a reason, never a crash."""

import copy
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_align import aligner, sample_of
from test_distributions import ALL
from tiny_families import byte_tokenizer

from vlm_distill_cache.common.errors import SampleError
from vlm_distill_cache.stage1_teacher.imports.distributions import sparse_rows
from vlm_distill_cache.stage1_teacher.imports.forms import FORMS, Reader, body_of
from vlm_distill_cache.stage1_teacher.imports.words import TokenWords

TOKENIZER = byte_tokenizer("<image>", bos=True)
IDS = [1, 10, 11, 12]
ENTRIES = [
    None,
    *[
        {str(token): {"logprob": -0.5 * token, "rank": 2, "decoded_token": "?"}, "40": {"logprob": -1.0}}
        for token in IDS[1:]
    ],
]
ROWS = [None, *[{token: -0.5 * token, 40: -1.0} for token in IDS[1:]]]
OWN = [[None, 1, None], *[[-0.5 * token, token, None] for token in IDS[1:]]]
TOPS = [None, *[[[-1.0, 40, None], [-0.5 * token, token, None]] for token in IDS[1:]]]
NUMBERS = [None, *[{key: value["logprob"] for key, value in entry.items()} for entry in ENTRIES[1:]]]
CHOICE = {"prompt_logprobs": ENTRIES, "prompt_token_ids": IDS}


def written(token: int) -> str:
    return f"token_id:{token}"


def content(tokens: list[int]) -> list[dict]:
    top = {"token": written(40), "logprob": -1.0, "bytes": None}
    return [
        {
            "token": written(t),
            "logprob": -0.5 * t,
            "bytes": None,
            "top_logprobs": [top, {"token": written(t), "logprob": -0.5 * t}],
        }
        for t in tokens
    ]


WHOLE = {
    "completion": {"choices": [CHOICE]},
    "chat": {**CHOICE, "choices": [{"logprobs": None}]},
    "offline dump": {"request_id": "0", **CHOICE, "outputs": [{"token_ids": [5], "logprobs": None}]},
    "numbers alone": {"prompt_token_ids": IDS, "prompt_logprobs": NUMBERS},
    "objects of a table": {
        "prompt_token_ids": IDS,
        "prompt_logprobs": [None, *[[{"token_id": int(k), **v} for k, v in e.items()] for e in ENTRIES[1:]]],
    },
    "numbers as texts": {"prompt_token_ids": IDS, "prompt_logprobs": [None, *[{t: str(-0.5 * t), 40: "-1"} for t in IDS[1:]]]},
    "pairs of a table": {"prompt_token_ids": IDS, "prompt_logprobs": [None, *[list(e.items()) for e in ENTRIES[1:]]]},
    "a table's missing keys": {"prompt_token_ids": IDS, "prompt_logprobs": [None, *[{**e, "77": None} for e in ENTRIES[1:]]]},
    "flat": {
        "prompt_token_ids": IDS,
        "prompt_logprobs": {
            "start_indices": [0, 0, 2, 4], "end_indices": [0, 2, 4, 6], "token_ids": [10, 40, 11, 40, 12, 40],
            "logprobs": [-5.0, -1.0, -5.5, -1.0, -6.0, -1.0], "ranks": [], "decoded_tokens": [],
        },
    },
    "sglang": {"meta_info": {"input_token_logprobs": OWN, "input_top_logprobs": TOPS, "prompt_tokens": 4}},
    "sglang without tops": {"meta_info": {"input_token_logprobs": OWN}},
    "nemo": {
        "tokens": [*IDS[:-1], 2], "labels": [*IDS[1:], 2], "topk_token_ids": [*[[t, 40] for t in IDS[1:]], [0, 0]],
        "topk_logits": [*[[3 - 0.5 * t, 2.0] for t in IDS[1:]], [0.0, 0.0]], "log_sum_exp_logits": [3.0] * 4,
    },
    "distillkit": {
        "input_ids": IDS, "token_ids": [[t, 40] for t in IDS[1:]], "top_values": [[-0.5 * t, -1.0] for t in IDS[1:]],
    },
    "echoed": {
        "choices": [{"logprobs": {
            "tokens": [written(t) for t in IDS], "token_logprobs": [None, *[-0.5 * t for t in IDS[1:]]],
            "top_logprobs": [None, *[{written(40): -1.0, written(t): -0.5 * t} for t in IDS[1:]]],
        }}]
    },
}  # fmt: skip


def read(body: dict, form: str = "auto"):
    return Reader(form=form, words=TokenWords(TOKENIZER)).read(body)


@pytest.mark.parametrize("name", WHOLE)
def test_every_form_of_a_prompt_says_the_same(name: str):
    served = read(WHOLE[name])
    assert served.whole
    assert list(served.tokens)[:4] == IDS
    expected = ROWS if name != "sglang without tops" else [None, *[{t: -0.5 * t} for t in IDS[1:]]]
    assert [served.distribution(place) for place in range(4)] == expected


def test_tokens_that_a_response_does_not_list_are_those_written_first():
    served = read({"prompt_logprobs": ENTRIES})
    assert list(served.tokens) == [None, *IDS[1:]]
    # vLLM's ids may hold the picture once where its log-probabilities hold each token.
    served = read({"prompt_logprobs": ENTRIES, "prompt_token_ids": [1, 12]})
    assert list(served.tokens) == [None, *IDS[1:]]


def test_generated_tokens_follow():
    own = {"output_token_logprobs": [[-6.5, 13, None]], "output_top_logprobs": [[[-1.0, 40, None]]]}
    for body in (
        {**CHOICE, "outputs": [{"token_ids": [13], "logprobs": [{"13": {"logprob": -6.5}, "40": {"logprob": -1.0}}]}]},
        {**CHOICE, "choices": [{"logprobs": {"content": content([13])}, "token_ids": [13]}]},
        {"meta_info": {**WHOLE["sglang"]["meta_info"], **own}},
        {"prompt_token_ids": IDS, "choices": [{"logprobs": {"content": content([13])}, "token_ids": [13]}]},
    ):
        served = read(body).joined()
        assert list(served.tokens) == [*IDS, 13]
        assert served.distribution(4) == {13: -6.5, 40: -1.0}


def test_an_answer_alone_is_known_as_such():
    served = read({"choices": [{"logprobs": {"content": content([11, 12])}}]})
    assert not served.whole
    assert list(served.tokens) == [11, 12]
    assert served.distribution(1) == {12: -6.0, 40: -1.0}
    assert not read({"meta_info": {"output_token_logprobs": OWN[1:], "output_top_logprobs": TOPS[1:]}}).whole


def test_batch_files_hold_the_body_inside():
    body = WHOLE["chat"]
    assert body_of({"custom_id": "s", "response": {"status_code": 200, "body": body}, "error": None}) is body
    assert body_of({"custom_id": "s", "response": body}) is body
    with pytest.raises(SampleError, match=r"answered with an error: \{'message': 'too long'\}"):
        body_of({"custom_id": "s", "response": None, "error": {"message": "too long"}})
    with pytest.raises(SampleError, match="answered with status 500"):
        body_of({"custom_id": "s", "response": {"status_code": 500, "body": {}}})


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({}, r"holds no log-probabilities .*ask the server for them"),
        ({"choices": []}, "holds no log-probabilities"),
        ({"choices": [{"message": {"content": "hi"}, "logprobs": None}]}, r"it has 'choices'"),
        ({"object": "error", "error": {"message": "no"}}, "answered with an error"),
        ({"choices": [{}, {}]}, "holds 2 choices; send one prompt a request, with n=1"),
        ({**WHOLE["nemo"], "labels": [9, 9, 9, 9]}, "labels are not the tokens shifted by one"),
        ({**WHOLE["nemo"], "labels": [9]}, "differ in length"),
        ({"prompt_logprobs": "x"}, "prompt_logprobs is 'x', expected a list"),
        ({"prompt_logprobs": [None, 5]}, r"prompt_logprobs\[1\] is 5, expected a list"),
        ({"prompt_logprobs": [None, {"dog": -1.0}]}, "prompt_logprobs is 'dog', expected a token id"),
        (
            {"meta_info": {"input_token_logprobs": OWN, "prompt_tokens": 9}},
            r"4 of the prompt's 9 tokens.*logprob_start_len=0",
        ),
        (
            {"meta_info": {"input_token_logprobs": OWN, "input_top_logprobs": TOPS[1:]}},
            r"has 4 tokens, input_top_logprobs 3",
        ),
        ({"meta_info": {"input_token_logprobs": [[-1.0]]}}, r"expected \[logprob, token id, text\]"),
    ],
)
def test_what_is_no_response_is_told(body: dict, said: str):
    with pytest.raises(SampleError, match=said):
        read(body)


@pytest.mark.parametrize("value", ["x", None, True, [], {}, 10**400])
def test_what_is_no_log_probability_is_told(value):
    body = copy.deepcopy(WHOLE["completion"])
    body["choices"][0]["prompt_logprobs"][1]["10"]["logprob"] = value
    with pytest.raises(SampleError, match=r"prompt_logprobs\[1\]\[10\] is .*, expected a (number|log-probability)"):
        read(body).distribution(1)


def test_two_log_probabilities_of_one_token_are_refused():
    body = {"meta_info": {"input_token_logprobs": OWN, "input_top_logprobs": [None, [[-0.1, 10, None]], [], []]}}
    with pytest.raises(SampleError, match=r"token 10 has two log-probabilities, -5 and -0.1"):
        read(body).distribution(1)


PACKED = {
    "input_ids": IDS,
    "compressed_logprobs": [[0] * 9] * 3,
    "bytepacked_indices": [[0, 0, 0]] * 3,
    "compression_config": {
        "d": 100,
        "k": 3,
        "exact_k": 1,
        "exact_dtype": "float16",
        "term_dtype": "bfloat16",
        "polynomial_terms": [0, "sqrt"],
        "residual_bins": [{"scale_dtype": "float16", "element_bits": 4, "num_elements": 2}],
        "delta_encoding": True,
    },
}
OLDER = {
    "input_ids": IDS, "packed_indices": [[0]] * 3, "exact_values": [[0.0]] * 3, "coeffs": [[0.0, 1.0]] * 3,
    "compression_config": {"vocab_size": 100, "k": 2, "exact_k": 1, "polynomial_degree": 1},
}  # fmt: skip
HOSTILE = WHOLE | {"packed": PACKED, "older": OLDER}
VALUES = st.sampled_from(
    [
        None,
        True,
        -1,
        0,
        2**70,
        1.5,
        math.nan,
        math.inf,
        "",
        "12",
        "token_id:3",
        "token_id:99999999999",
        [],
        {},
        [[]],
        [{}],
    ]
)


@given(
    name=st.sampled_from(sorted(WHOLE)),
    value=VALUES,
    pick=st.randoms(use_true_random=False),
    form=st.sampled_from(["auto", *FORMS]),
)
@settings(max_examples=400, deadline=None)
def test_a_response_with_anything_in_any_place_is_read_or_told(name: str, value, pick, form: str):
    body = copy.deepcopy(HOSTILE[name])
    here, steps = body, pick.randint(1, 6)
    for step in range(steps):  # walk down, and put the value in where the walk ends
        keys = list(here) if isinstance(here, dict) else list(range(len(here)))
        key = pick.choice(keys)
        if step == steps - 1 or not isinstance(here[key], dict | list) or not here[key]:
            here[key] = value
            break
        here = here[key]
    try:
        served = read(body, form).joined()
        for place in range(len(served.tokens)):
            served.distribution(place)
        rows = aligner().distributions(sample_of(IDS, [2, 3]), served)
        live = sparse_rows(ALL, rows, IDS[2:], vocabulary=len(TOKENIZER), missing_target="middle")
        assert not any(ALL.damage({**ALL.encode(live), "labels": np.array(IDS[2:], np.uint32)}))
    except SampleError:
        pass
