"""Answers in words that the tokenizer lacks: counted, said, and refused above a share before the teacher's work."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_families import byte_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from vlm_distill_cache.common.cache.plan import read_plan
from vlm_distill_cache.common.cache.schema import IGNORE_INDEX
from vlm_distill_cache.common.cache.sidecar import read_sidecar
from vlm_distill_cache.common.errors import ConfigError, DataError
from vlm_distill_cache.common.opening import open_cache
from vlm_distill_cache.common.tools.verify import verify
from vlm_distill_cache.data.builtin import load_tokenizer
from vlm_distill_cache.stage1_teacher.config import BuildConfig
from vlm_distill_cache.stage1_teacher.loop import unknown_words
from vlm_distill_cache.stage1_teacher.loop.unknown_words import UnknownBudget, UnknownToken
from vlm_distill_cache.stage1_teacher.loop.work import Build
from vlm_distill_cache.stage1_teacher.report import summary_text

KNOWN, UNKNOWN = "the square is red .", "ein Quadrat"


def write_data(folder: Path, answers: list[str], *, pictures=lambda index: True) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for index, answer in enumerate(answers):
        mark = "<image>\n" if pictures(index) else ""
        question = {"from": "human", "value": f"{mark}what color is the square ?"}
        entry = {"id": f"s{index}", "conversations": [question, {"from": "gpt", "value": answer}]}
        if pictures(index):
            entry["image"] = f"{index}.png"
            Image.new("RGB", (30, 30), (index, 80, 90)).save(folder / f"{index}.png")
        entries.append(entry)
    (folder / "data.json").write_text(json.dumps(entries))
    return str(folder / "data.json")


def unknown_in(folder: Path) -> int:
    """The slow, obvious count."""
    token = load_tokenizer().unk_token_id
    cache = open_cache(folder)
    return sum(label == token for name in cache for label in cache.read(name)["labels"].tolist())


@pytest.fixture
def teacher_calls(monkeypatch) -> list[int]:
    """Sizes of the batches that the teacher was run on."""
    calls: list[int] = []
    run = Build.run

    def counted(self, batch, inputs=None):
        calls.append(len(batch))
        return run(self, batch, inputs)

    monkeypatch.setattr(Build, "run", counted)
    return calls


def test_answers_in_unknown_words_are_refused_before_the_teacher_and_leave_nothing(
    tmp_path, build_cache, teacher_calls
):
    data = write_data(tmp_path, [UNKNOWN, "zwei", KNOWN, "图片", UNKNOWN])
    with pytest.raises(DataError) as caught:
        build_cache(tmp_path / "cache", data=data)
    # Targets: 2 + end, 1 + end, 5 + end, 1 + end, 2 + end.
    assert "6 of 16 targets (37.5 %)" in str(caught.value)
    assert "--teacher DIR" in str(caught.value)
    assert "--set max_unknown_share=0.4" in str(caught.value)
    assert teacher_calls == []
    assert not (tmp_path / "cache").exists()
    summary = build_cache(tmp_path / "cache", data=data, max_unknown_share=0.4)
    assert summary.manifest is not None
    assert summary.manifest.totals["unknown_rows"] == unknown_in(tmp_path / "cache") == 6
    assert "warning: 6 of 16 targets (37.5 %) are words that the tokenizer lacks" in summary_text(summary)
    assert "Unknown words: 6 of 16 targets" in (tmp_path / "cache" / "README.md").read_text()
    assert verify(tmp_path / "cache", deep=True) == []


def test_a_few_unknown_words_are_taught_and_said_and_the_option_is_no_part_of_the_plan(tmp_path, build_cache):
    data = write_data(tmp_path, [KNOWN] * 8 + ["the zebra is red ."])
    summary = build_cache(tmp_path / "cache", data=data)
    assert "1 of 54 targets (1.85 %)" in summary_text(summary)
    assert build_cache(tmp_path / "cache", data=data, max_unknown_share=1.0).built == 0
    clean = build_cache(tmp_path / "clean", data=write_data(tmp_path / "2", [KNOWN] * 3))
    assert clean.manifest is not None
    assert clean.manifest.totals["unknown_rows"] == 0
    assert "lacks" not in summary_text(clean)
    assert "unknown" not in json.dumps(read_plan(tmp_path / "clean").to_dict())


def test_words_that_the_probe_did_not_see_are_refused_as_soon_as_they_are_certain(
    tmp_path, build_cache, teacher_calls, monkeypatch
):
    monkeypatch.setattr(unknown_words, "PROBED_SAMPLES", 1)  # the first
    data = write_data(tmp_path, [KNOWN] * 4 + [UNKNOWN] * 4)
    with pytest.raises(DataError, match=r"8 of 36 targets .* of 8 of 8 samples"):
        build_cache(tmp_path / "cache", data=data, shard_size=4, max_unknown_share=0.1)
    assert sum(teacher_calls) == 4  # the shard of known words
    # Resumed, a finished shard counts too (it may have been in the writer's queue still): the share is 8 of 36.
    with pytest.raises(DataError, match="8 of 36 targets"):
        build_cache(tmp_path / "cache", data=data, shard_size=4, max_unknown_share=0.22)
    build_cache(tmp_path / "cache", data=data, shard_size=4, max_unknown_share=0.23)
    assert [read_sidecar(tmp_path / "cache", shard).unknown.rows for shard in range(2)] == [0, 8]


def test_unknown_words_of_a_first_shard_do_not_count_for_all(tmp_path, build_cache, monkeypatch):
    monkeypatch.setattr(unknown_words, "PROBED_SAMPLES", 1)  # the first
    data = write_data(tmp_path, [KNOWN, "the zebra is red ."] + [KNOWN] * 6)
    assert build_cache(tmp_path / "cache", data=data, shard_size=2, max_unknown_share=0.03).built == 4


def test_shares_are_checked():
    for wrong in (-0.1, 1.1, float("nan")):
        with pytest.raises(ConfigError, match="max_unknown_share"):
            BuildConfig(cache="c", max_unknown_share=wrong)


def labels_of(*answers: list[int]) -> SimpleNamespace:
    """A sample whose supervised rows are these answers, prompts between them."""
    gap = [IGNORE_INDEX, IGNORE_INDEX]
    labels = np.array(gap + [label for answer in answers for label in [*answer, *gap]], dtype=np.int64)
    return SimpleNamespace(labels=labels, supervised_rows=np.flatnonzero(labels != IGNORE_INDEX))


@pytest.mark.parametrize("seed", range(20))
def test_the_end_of_an_answer_is_no_unknown_word(seed):
    random = torch.Generator().manual_seed(seed)
    answers = [torch.randint(3, 6, (int(torch.randint(1, 6, (), generator=random)),), generator=random).tolist()
               for _ in range(3)]  # fmt: skip
    plain = UnknownToken(token=3, ends_answers=False, known=9)
    assert plain.count_rows(labels_of(*answers)) == sum(answer.count(3) for answer in answers)
    ended = [[*answer, 3] for answer in answers]
    same = UnknownToken(token=3, ends_answers=True, known=9)
    assert same.count_rows(labels_of(*ended)) == sum(answer.count(3) for answer in answers)
    assert same.count([labels_of(*ended)]).token is None
    assert UnknownToken(token=None, ends_answers=False, known=9).count_rows(labels_of(*answers)) == 0


def word_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    vocabulary = {word: number for number, word in enumerate(["<unk>", "</s>", "a", "b", "red"])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=special["unk_token"]))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


@pytest.mark.parametrize(
    ("tokenizer", "token", "ends"),
    [
        (load_tokenizer(), load_tokenizer().unk_token_id, False),
        (word_tokenizer(unk_token="<unk>", eos_token="</s>", pad_token="<unk>"), 0, False),
        (word_tokenizer(unk_token="</s>", eos_token="</s>"), 1, True),
        (byte_tokenizer("<image>"), byte_tokenizer("<image>").unk_token_id, False),
    ],
    ids=["built-in", "unk is pad", "unk is eos", "bytes"],
)
def test_the_unknown_token_is_the_tokenizers_and_may_have_other_uses(tokenizer, token, ends):
    ends_of = [tokenizer.eos_token_id]
    found = UnknownToken.of(SimpleNamespace(tokenizer=tokenizer, end_token_ids=ends_of))
    assert (found.token, found.ends_answers) == (token, ends)


def test_the_share_is_of_all_targets_as_far_as_their_number_is_known():
    words = UnknownToken(token=3, ends_answers=False, known=9)
    budget = UnknownBudget(words=words, total=8, share=0.25)
    budget.spend([labels_of([3, 3])] * 2, failed=0)  # 4 of about 16
    budget.share = 0.5
    budget.spend([], failed=2)  # now of about 8
    with pytest.raises(DataError, match="5 of 5 targets"):
        budget.spend([labels_of([3])], failed=0)
