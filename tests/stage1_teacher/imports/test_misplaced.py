"""A dump whose rows are about other tokens is refused in every form, and honest dumps never are."""

import itertools
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_align import TOKENIZER, aligner, sample_of
from test_distributions import ALL

from vlm_distill_cache.common.errors import SampleError
from vlm_distill_cache.stage1_teacher.imports.distributions import sparse_rows
from vlm_distill_cache.stage1_teacher.imports.forms import Reader
from vlm_distill_cache.stage1_teacher.imports.misplaced import refuse_misplaced
from vlm_distill_cache.stage1_teacher.imports.words import TokenWords

V, T = 60, 14
ANSWER = list(range(8, T))


def sequence(seed: int) -> list[int]:
    return [1, *np.random.default_rng(seed).choice(np.arange(3, V), T - 1, replace=False).tolist()]


def rows_of(ids: list[int], seed: int, *, learnt: float) -> list[np.ndarray | None]:
    """Of each token the log-probabilities that it was drawn from; what is ``learnt`` is how much likelier the right one is."""
    rng = np.random.default_rng(seed)
    rows: list[np.ndarray | None] = [None]
    for token in ids[1:]:
        logits = rng.normal(0, 1, V)
        logits[token] += learnt
        rows.append(logits - np.log(np.exp(logits).sum()))
    return rows


def tops(row: np.ndarray, k: int) -> list[tuple[int, float]]:
    return [(int(token), float(row[token])) for token in np.argsort(-row)[:k]]


def told(row: np.ndarray, token: int, k: int) -> list[tuple[int, float]]:
    return [(token, float(row[token])), *[item for item in tops(row, k) if item[0] != token]]


def vllm(ids, rows, k):
    entries = [
        None if row is None else {str(t): {"logprob": v} for t, v in told(row, token, k)}
        for row, token in zip(rows, ids, strict=True)
    ]
    return {"prompt_token_ids": ids, "prompt_logprobs": entries}


def sglang(ids, rows, k):
    own = [[None if row is None else float(row[token]), token, None] for row, token in zip(rows, ids, strict=True)]
    listed = [None if row is None else [[v, t, None] for t, v in tops(row, k)] for row in rows]
    return {"meta_info": {"input_token_logprobs": own, "input_top_logprobs": listed, "prompt_tokens": len(ids)}}


def echo(ids, rows, k):
    own = [None if row is None else float(row[token]) for row, token in zip(rows, ids, strict=True)]
    listed = [None if row is None else {f"token_id:{t}": v for t, v in tops(row, k)} for row in rows]
    texts = [f"token_id:{token}" for token in ids]
    return {"choices": [{"logprobs": {"tokens": texts, "token_logprobs": own, "top_logprobs": listed}}]}


def distillkit(ids, rows, k):
    listed = [tops(row, k) for row in rows[1:]]
    likely, values = ([[item[part] for item in row] for row in listed] for part in (0, 1))
    return {"input_ids": ids, "token_ids": likely, "top_values": values}


def nemo(ids, rows, k):
    listed = [tops(row, k) for row in rows[1:]]
    return {
        "tokens": ids[:-1], "labels": ids[1:], "topk_token_ids": [[t for t, _ in row] for row in listed],
        "topk_logits": [[v + 3 for _, v in row] for row in listed], "log_sum_exp_logits": [3.0] * len(listed),
    }  # fmt: skip


FORMS: dict[str, Callable] = {"vllm": vllm, "sglang": sglang, "echo": echo, "distillkit": distillkit, "nemo": nemo}


def read(body: dict, ids: list[int], missing_target: str = "middle") -> list:
    served = Reader(form="auto", words=TokenWords(TOKENIZER)).read(body)
    sample = sample_of(ids, ANSWER)
    found = aligner().distributions(sample, served)
    labels = [ids[place] for place in ANSWER]
    refuse_misplaced(found, labels, sample.supervised_rows.tolist())
    sparse_rows(ALL, found, labels, vocabulary=len(TOKENIZER), missing_target=missing_target)
    return found


@given(
    form=st.sampled_from(sorted(FORMS)),
    seed=st.integers(0, 2**32 - 1),
    learnt=st.floats(0, 12),
    k=st.sampled_from([1, 5, 20, V]),
)
@settings(max_examples=150, deadline=None)
def test_honest_dumps_are_read(form: str, seed: int, learnt: float, k: int):
    ids = sequence(seed)
    rows = rows_of(ids, seed, learnt=learnt)
    for place, row in zip(ANSWER, read(FORMS[form](ids, rows, k), ids), strict=True):
        expected = rows[place]
        assert expected is not None
        for token, value in row.items():
            assert value == pytest.approx(expected[token])


def behind(rows: list) -> list:
    """Row j about token j + 1, as a model writes its logits."""
    return [*rows[1:], rows[-1]]


def late(rows: list) -> list:
    return [None, *rows[:-1]]


def late_filled(rows: list) -> list:
    return [None, rows[1], *rows[1:-1]]


@pytest.mark.parametrize("form", ["vllm", "sglang", "echo"])
@pytest.mark.parametrize("k", [1, 5, V])
@pytest.mark.parametrize("shift", [behind, late])
@pytest.mark.parametrize("learnt", [0.0, 8.0])
def test_a_servers_dump_that_is_off_by_one_is_refused_whatever_the_teacher_has_learnt(
    form: str, k: int, shift, learnt: float
):
    ids = sequence(3)
    body = FORMS[form](ids, shift(rows_of(ids, 3, learnt=learnt)), k)
    with pytest.raises(SampleError, match=r"at the prompt's (first|second) token|answer token 1 is 1 "):
        read(body, ids)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("k", [5, 20, V])
@pytest.mark.parametrize("step", [-1, 1])
def test_rows_that_a_teacher_explains_elsewhere_are_refused(form: str, k: int, step: int):
    ids = sequence(5)
    rows = rows_of(ids, 5, learnt=9.0)
    moved = [None, *(rows[min(max(place + step, 1), T - 1)] for place in range(1, T))]
    with pytest.raises(SampleError, match=r"off by one|are about other tokens|one place too late|of another token"):
        read(FORMS[form](ids, moved, k), ids)


@pytest.mark.parametrize("k", [5, V])
@pytest.mark.parametrize("shift", [behind, late])
def test_likeliest_tokens_that_are_off_by_one_beside_right_own_values_are_refused(k: int, shift):
    ids = sequence(7)
    rows = rows_of(ids, 7, learnt=0.0)
    body = sglang(ids, rows, k)
    body["meta_info"]["input_top_logprobs"] = sglang(ids, shift(rows), k)["meta_info"]["input_top_logprobs"]
    with pytest.raises(SampleError, match="at the prompt's"):
        read(body, ids)


def test_entries_that_begin_with_the_token_beside_are_refused():
    ids = sequence(11)
    rows = rows_of(ids, 11, learnt=0.0)
    body = vllm(ids, rows, V)
    body["prompt_logprobs"] = [None, body["prompt_logprobs"][1], *body["prompt_logprobs"][1:-1]]
    with pytest.raises(SampleError, match="begin with the token before their own"):
        read(body, ids)


def test_each_entry_of_vllm_holds_its_own_token():
    ids = sequence(13)
    body = vllm(ids, rows_of(ids, 13, learnt=0.0), 5)
    del body["prompt_logprobs"][10][str(ids[10])]
    with pytest.raises(SampleError, match=rf"prompt_logprobs\[10\] does not hold its own token, {ids[10]}"):
        read(body, ids)


def test_a_token_that_is_likelier_than_the_likeliest_is_told():
    ids = sequence(17)
    body = sglang(ids, rows_of(ids, 17, learnt=8.0), 3)
    body["meta_info"]["input_top_logprobs"][10] = [[-2.0, 50, None], [-9.0, 51, None]]
    with pytest.raises(SampleError, match=rf"token {ids[10]} has the log-probability -0.* is not among the likeliest"):
        read(body, ids)


@pytest.mark.parametrize("form", [distillkit, nemo])
@pytest.mark.parametrize("first", ["repeated", "empty"])
def test_a_first_row_that_only_fills_a_place_is_told(form, first: str):
    ids = sequence(19)
    body = form(ids, late_filled(rows_of(ids, 19, learnt=0.0)), 20)
    if first == "empty":
        body["top_values" if form is distillkit else "topk_logits"][0] = [-1e9] * 20
    with pytest.raises(SampleError, match=r"row 0 .*(repeats row 1|is no distribution)"):
        read(body, ids)


def test_the_same_numbers_at_every_token_are_refused():
    rows = [{token: -1.0, 50: -1.5, 51: -2.5} for token in (10, 11, 12)]
    with pytest.raises(SampleError, match="the same log-probabilities stand at each"):
        refuse_misplaced(rows, [10, 11, 12], [4, 5, 6])
    refuse_misplaced(rows[:1], [10], [4])


@given(seed=st.integers(0, 2**32 - 1), k=st.integers(1, 20), scale=st.floats(0.1, 1), pull=st.floats(0, 1.8))
@settings(max_examples=100, deadline=None)
def test_a_teacher_that_has_learnt_nothing_but_to_repeat_is_not_refused(seed: int, k: int, scale: float, pull: float):
    """A model of random weights whose output table is its input table prefers the token that it has just read."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, V, 30).tolist()
    rows = []
    for before, token in itertools.pairwise(ids):
        logits = rng.normal(0, scale, V)
        logits[before] += pull
        row = logits - np.log(np.exp(logits).sum())
        rows.append(dict(told(row, token, k)))
    refuse_misplaced(rows, ids[1:], list(range(1, 30)))
