"""Rows as other projects' writers pack them, written here anew from what their formats say."""

import itertools
import json
import math
import random
import struct
from pathlib import Path

import numpy as np
import pytest
import yaml
from click.testing import CliRunner
from fake_server import FakeServer, write_lines
from family_caches import entry
from tiny_families import save_tiny

from vlm_distill_cache.commands import group_of
from vlm_distill_cache.common.errors import SampleError
from vlm_distill_cache.common.opening import open_cache
from vlm_distill_cache.common.tools.verify import verify
from vlm_distill_cache.stage1_teacher.imports.cli import FORMATS
from vlm_distill_cache.stage1_teacher.imports.distillkit import read_distillkit
from vlm_distill_cache.stage1_teacher.imports.forms import FORMS

K = 12
PLAIN = {"f2": "<e", "f4": "<f", "f8": "<d"}
NAMES = {"f2": "float16", "f4": "float32", "f8": "float64", "bf": "bfloat16"}


def number(value: float, kind: str) -> bytes:
    if kind == "bf":  # the upper half of a float32
        return struct.pack("<f", value)[2:]
    return struct.pack(PLAIN[kind], value)


def bits_of(values: list[int], width: int) -> list[int]:
    text = "".join(format(value, f"0{width}b") for value in values)
    text += "0" * (-len(text) % 8)
    return [int(text[start : start + 8], 2) for start in range(0, len(text), 8)]


def pack(log_probs: list[float], *, exact: int, kind: str, bins: list[tuple[str, int, int]], delta: bool) -> list[int]:
    """A row by the newer codec without a polynomial: exact values, then bins of rounded ones with a scale each."""
    values = [log_probs[0], *(b - a for a, b in itertools.pairwise(log_probs))] if delta else log_probs
    data = b"".join(number(value, kind) for value in values[:exact])
    place = exact
    for scale_kind, width, count in bins:
        chunk = values[place : place + count]
        largest = max(map(abs, chunk)) or 1.0
        scale = struct.unpack("<f", struct.pack("<f", largest / 2 ** (width - 1)))[0]
        low, high = -(2 ** (width - 1)), 2 ** (width - 1) - 1
        codes = [min(max(round(value / scale), low), high) - low for value in chunk]
        data += number(scale, scale_kind) + bytes(bits_of(codes, width))
        place += count
    return list(data)


def falling(seed: int) -> tuple[list[int], list[float]]:
    rng = random.Random(seed)
    raw = sorted((rng.uniform(0.1, 6) for _ in range(K)), reverse=True)
    total = math.log(sum(map(math.exp, raw)) * 1.3)
    return rng.sample(range(300), K), [value - total for value in raw]


@pytest.mark.parametrize("delta", [True, False])
@pytest.mark.parametrize("kind", ["f2", "f4", "f8", "bf"])
@pytest.mark.parametrize("bins", [[], [("f4", 8, 4)], [("f4", 8, 3), ("f4", 5, 5)]])
def test_packed_rows_are_what_was_packed(delta: bool, kind: str, bins: list):
    exact = K - sum(count for _, _, count in bins)
    settings = {
        "d": 300, "k": K, "exact_k": exact, "exact_dtype": NAMES[kind], "delta_encoding": delta, "polynomial_terms": None,
        "residual_bins": [{"scale_dtype": NAMES[s], "element_bits": w, "num_elements": c} for s, w, c in bins],
    }  # fmt: skip
    rows = [falling(seed) for seed in range(3)]
    body = {
        "input_ids": [1, 2, 3, 4], "compression_config": settings,
        "compressed_logprobs": [pack(values, exact=exact, kind=kind, bins=bins, delta=delta) for _, values in rows],
        "bytepacked_indices": [bits_of(ids, 9) for ids, _ in rows],
    }  # fmt: skip
    served = read_distillkit(body)
    assert list(served.tokens) == [1, 2, 3, 4]
    assert served.distribution(0) is None
    coarse = {"f2": 5e-3, "f4": 1e-4, "f8": 1e-4, "bf": 8e-2}[kind] * (3 if delta else 1) + (0.3 if bins else 0)
    for place, (ids, values) in enumerate(rows, start=1):
        found = served.distribution(place)
        assert list(found) == ids
        np.testing.assert_allclose(list(found.values()), values, atol=coarse)


@pytest.mark.parametrize("normalise", [True, False])
def test_a_polynomial_in_the_rank_is_added(normalise: bool):
    settings = {
        "d": 300,
        "k": 6,
        "exact_k": 2,
        "polynomial_terms": [0, 1, 2, "sqrt"],
        "delta_encoding": False,
        "normalize_t": normalise,
    }
    factors = [-3.0, -0.5, -0.25, 0.125]
    data = b"".join(struct.pack("<f", value) for value in (-0.5, -1.0, *factors))
    body = {
        "input_ids": [1, 2], "compression_config": settings, "compressed_logprobs": [list(data)],
        "bytepacked_indices": [bits_of([5, 6, 7, 8, 9, 10], 9)],
    }  # fmt: skip
    ranks = [place / 3 if normalise else place for place in range(4)]
    expected = [-0.5, -1.0, *(-3 - 0.5 * t - 0.25 * t * t + 0.125 * t**0.5 for t in ranks)]
    np.testing.assert_allclose(list(read_distillkit(body).distribution(1).values()), expected, rtol=1e-6)


@pytest.mark.parametrize("delta", [True, False])
def test_a_polynomial_is_as_fine_as_its_factors_beside_coarse_exact_values(delta: bool):
    """Only the exact values are rounded to bfloat16, which has 8 bits; the others are sums of float32 numbers."""
    settings = {
        "d": 300, "k": 6, "exact_k": 2, "exact_dtype": "bfloat16", "term_dtype": "float32", "polynomial_terms": [0, 1],
        "delta_encoding": delta, "residual_bins": [{"scale_dtype": "float32", "element_bits": 8, "num_elements": 2}],
    }  # fmt: skip
    data = number(-0.5, "bf") + number(-1.0, "bf") + struct.pack("<ff", -3.001, -0.013) + struct.pack("<f", 0.125)
    body = {
        "input_ids": [1, 2], "compression_config": settings, "compressed_logprobs": [[*data, 128 + 1, 128 - 2]],
        "bytepacked_indices": [bits_of([5, 6, 7, 8, 9, 10], 9)],
    }  # fmt: skip
    expected = [-0.5, -1.0, *(-3.001 - 0.013 * t + r for t, r in zip(range(4), (0.125, -0.25, 0, 0), strict=True))]
    if delta:
        expected = list(itertools.accumulate(expected))
    # With deltas DistillKit rounds the sums to the type of the exact values.
    np.testing.assert_allclose(
        list(read_distillkit(body).distribution(1).values()), expected, rtol=1e-2 if delta else 1e-6
    )


@pytest.mark.parametrize("term", [[1], {}, "cos", True, 1.5, None, 10**12, -65])
def test_terms_of_a_polynomial_that_are_none_are_told(term):
    settings = {"d": 300, "k": 4, "exact_k": 2, "polynomial_terms": [0, term]}
    body = {
        "input_ids": [1, 2], "compression_config": settings, "compressed_logprobs": [[0] * 16],
        "bytepacked_indices": [[0] * 5],
    }  # fmt: skip
    with pytest.raises(
        SampleError, match=r"compression_config.yaml: polynomial_terms is .*whole numbers up to 64, sqrt"
    ):
        read_distillkit(body)


@pytest.mark.parametrize("inverse", [True, False])
def test_rows_of_the_older_codec(inverse: bool):
    settings = {
        "vocab_size": 300,
        "k": 8,
        "exact_k": 3,
        "polynomial_degree": 2,
        "invert_polynomial": inverse,
        "with_sqrt_term": True,
    }
    ids, exact, factors = [9, 8, 7, 6, 5, 4, 299, 0], [-0.5, -1.5, -2.5], [-6.0, 0.5, 0.25, -0.125]
    words = [sum(token << (9 * place) for place, token in enumerate(ids[start : start + 7])) for start in (0, 7)]
    body = {
        "input_ids": [1, 2],
        "compression_config": settings,
        "packed_indices": [words],
        "exact_values": [exact],
        "coeffs": [factors],
    }
    sign = -1 if inverse else 1
    rest = [-6 + 0.5 * r**sign + 0.25 * r ** (2 * sign) - 0.125 * r**0.5 for r in range(1, 6)]
    found = read_distillkit(body).distribution(1)
    assert list(found) == ids
    np.testing.assert_allclose(list(found.values()), [*exact, *rest], rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"compression_config": None}, "put DistillKit's compression_config.yaml beside the file"),
        ({"compression_config": {}}, "compression_config.yaml: k is None, expected a whole number"),
        ({"compression_config": {"k": 4, "exact_k": 9, "d": 300}}, "exact_k is 9, more than k, 4"),
        ({"compression_config": {"k": 4, "exact_k": 3, "d": 300}}, "row 0 was packed with other settings"),
        ({"compressed_logprobs": [[1, 2]]}, "row 0 was packed with other settings"),
        ({"compressed_logprobs": [[1, 2, 300]]}, "expected bytes"),
        ({"compressed_logprobs": [[0]] * 4}, "a sequence of 2 tokens has"),
        ({"input_ids": "x"}, "input_ids is 'x', expected a list"),
    ],
)
def test_rows_that_do_not_fit_are_told(change: dict, said: str):
    settings = {"d": 300, "k": 2, "exact_k": 2, "delta_encoding": False, "residual_bins": []}
    body = {
        "input_ids": [1, 2], "compression_config": settings, "compressed_logprobs": [list(struct.pack("<ff", -1, -2))],
        "bytepacked_indices": [bits_of([5, 6], 9)],
    }  # fmt: skip
    assert read_distillkit(body).distribution(1) == {5: -1.0, 6: -2.0}
    with pytest.raises(SampleError, match=said):
        read_distillkit(body | change).distribution(1)


def test_the_formats_of_the_command_are_those_that_are_read():
    assert ("auto", *FORMS) == FORMATS


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    questions = ["Is water wet?", "Is ice cold?", "Is fire hot?", "Who is it?"]
    entries = [entry(f"t{place}", None, question, "Yes, so they say") for place, question in enumerate(questions)]
    path = tmp_path_factory.mktemp("texts") / "data.json"
    path.write_text(json.dumps(entries))
    return path


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    return save_tiny("llava", tmp_path_factory.mktemp("llava") / "teacher")


@pytest.fixture(scope="module")
def server(teacher: Path, texts: Path) -> FakeServer:
    return FakeServer(teacher, texts)


def top(row, k: int) -> tuple[list[int], list[float]]:
    values, ids = row.topk(k)
    return ids.tolist(), values.tolist()


def distillkit_rows(server: FakeServer, k: int) -> list[dict]:
    """Rows with the pad token that its sampler adds, and no id."""
    rows = []
    for sample in server.samples:
        tops = [top(row, k) for row in server.log_probs(sample)]
        rows.append({
            "input_ids": [*sample.input_ids.tolist(), 0],
            "compressed_logprobs": [pack(values, exact=k, kind="f4", bins=[], delta=True) for _, values in tops],
            "bytepacked_indices": [bits_of(ids, 9) for ids, _ in tops],
        })  # fmt: skip
    return rows


def nemo_rows(server: FakeServer, k: int) -> list[dict]:
    """Rows padded to the longest of a batch, logits beside their log-sum-exp."""
    longest = max(len(sample) for sample in server.samples)
    rows = []
    for index, sample in enumerate(server.samples):
        ids, pad = sample.input_ids.tolist(), longest - len(sample)
        tops = [top(row, k) for row in server.log_probs(sample)[:-1]] + [([0] * k, [0.0] * k)] * pad
        rows.append({
            "tokens": ids[:-1] + [2] * pad, "labels": ids[1:] + [2] * pad, "loss_mask": [1] * (longest - 1), "index": index,
            "topk_logits": [[value + 7.5 for value in values] for _, values in tops], "topk_token_ids": [ids for ids, _ in tops],
            "log_sum_exp_logits": [7.5] * (longest - 1),
        })  # fmt: skip
    return rows


def run(file: Path, data: Path, teacher: Path, cache: Path, *options: str):
    words = ["import-logprobs", file, "--data", data, "--teacher", teacher, "--cache", cache, *options]
    return CliRunner().invoke(group_of("common"), [str(word) for word in words])


@pytest.mark.parametrize("make", [distillkit_rows, nemo_rows])
@pytest.mark.slow(quick=("nemo_rows",))
def test_rows_without_ids_are_found_by_their_tokens(make, server, texts: Path, teacher: Path, tmp_path: Path):
    vocabulary = len(server.tokenizer)
    rows = make(server, vocabulary)
    random.Random(0).shuffle(rows)
    folder = tmp_path / "dump"
    folder.mkdir()
    write_lines(folder / "rows.jsonl", rows)
    settings = {"d": 300, "k": vocabulary, "exact_k": vocabulary, "delta_encoding": True, "residual_bins": []}
    (folder / "compression_config.yaml").write_text(yaml.safe_dump(settings))
    result = run(folder, texts, teacher, tmp_path / "cache", "--set", f"logits=fixed:{K}")
    assert result.exit_code == 0, result.output
    asked = write_lines(
        tmp_path / "v.jsonl", [{"custom_id": s.sample_id, "response": server.vllm(s, K)} for s in server.samples]
    )
    assert run(asked, texts, teacher, tmp_path / "asked", "--set", f"logits=fixed:{K}").exit_code == 0
    found, expected = open_cache(tmp_path / "cache"), open_cache(tmp_path / "asked")
    assert list(found) == list(expected) == ["t0", "t1", "t2", "t3"]
    for sample_id, record in expected.items():
        ours, theirs = found.decode("logits", found[sample_id]), expected.decode("logits", record)
        np.testing.assert_array_equal(ours.token_ids, theirs.token_ids)
        np.testing.assert_allclose(np.exp(ours.log_probs), np.exp(theirs.log_probs), atol=2e-3)
        np.testing.assert_allclose(np.exp(ours.tail_log_mass), np.exp(theirs.tail_log_mass), atol=2e-3)


def test_targets_that_are_not_listed(server, texts: Path, teacher: Path, tmp_path: Path, caplog):
    file = write_lines(tmp_path / "rows.jsonl", nemo_rows(server, 3))
    refused = run(file, texts, teacher, tmp_path / "cache")
    assert refused.exit_code == 1
    assert "its own log-probability is not among the 3 that are given" in " ".join(refused.output.split())
    assert "--missing-target middle" in " ".join(refused.output.split())
    assert run(file, texts, teacher, tmp_path / "cache", "--overwrite", "--missing-target", "middle").exit_code == 0
    assert "answer tokens the probability is not told" in caplog.text
    assert not list(verify(tmp_path / "cache", deep=True))
    cache = open_cache(tmp_path / "cache")
    assert cache.plan.data["missing_target"] == "middle"
    for sample in server.samples:
        rows = cache.decode("logits", cache[sample.sample_id])
        dense = server.log_probs(sample)[sample.supervised_rows].exp().numpy()
        for place, target in enumerate(sample.labels[sample.supervised_rows]):
            listed = np.flatnonzero(rows.token_ids[place] == target)
            # At most half of what is possible away from the truth.
            most = np.sort(dense[place])[-3]
            assert abs(math.exp(rows.log_probs[place][listed[0]]) - dense[place][target]) <= most / 2 + 2e-3


@pytest.mark.parametrize(
    ("name", "row", "said"),
    [
        (
            "a.jsonl",
            {"input_ids": [1], "target_logprobs": [[0.0]], "target_token_ids": [[1]], "target_mask": [[1]]},
            "axolotl prepared",
        ),
        (
            "a.jsonl",
            {"messages": [], "llm_text_generation_vllm_logprobs": [[{"logprob": -1.0, "token": "token_id:3"}]]},
            "without the ids",
        ),
        (
            "a.jsonl",
            {"tokens": [1], "top_k_logits": [[1.0]], "top_k_indices": [[3]]},
            "without the sum over all others",
        ),
        ("a.array_record", {}, "pickles, which can run code"),
    ],
)
def test_what_a_format_does_not_say_is_named(
    name: str, row: dict, said: str, texts: Path, teacher: Path, tmp_path: Path
):
    result = run(write_lines(tmp_path / name, [row]), texts, teacher, tmp_path / "cache")
    assert result.exit_code == 1
    assert said in " ".join(result.output.split())


def test_samples_that_are_packed_behind_others_are_told(server, texts: Path, teacher: Path, tmp_path: Path):
    first, second = server.samples[:2]
    rows = []
    for parts in ([first, second], *([sample] for sample in server.samples[2:])):
        tops = [top(row, 5) for sample in parts for row in server.log_probs(sample)]
        rows.append({
            "input_ids": [token for sample in parts for token in sample.input_ids.tolist()],
            "token_ids": [ids for ids, _ in tops], "top_values": [values for _, values in tops],
        })  # fmt: skip
    result = run(
        write_lines(tmp_path / "rows.jsonl", rows), texts, teacher, tmp_path / "cache", "--missing-target", "middle"
    )
    assert result.exit_code == 1
    assert (
        "t1: no row of the files has its id or begins with its tokens; of a row in which several samples"
        in result.output
    )
    assert "Fix the responses, or what they are compared with" in result.output
    assert "max_failed_share=0.5" in result.output
    assert "CACHE_SET" not in result.output
