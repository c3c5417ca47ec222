"""Tokenizer files of strangers are refused in words before they can hold or end a process; the usual ones pass, once."""

import json
import subprocess
import time

import pytest

from vlm_distill_cache.common.errors import ModelError
from vlm_distill_cache.data.builtin import processor_directory
from vlm_distill_cache.data.text import tokenizer_trial
from vlm_distill_cache.data.text.processors import load_tokenizer


def longer(times):
    step = {"type": "Replace", "pattern": {"String": ""}, "content": "a" * 10}
    return {"normalizer": {"type": "Sequence", "normalizers": [step] * times}}


def split(pattern):
    return {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}}


HOSTILE = {
    "six times longer": longer(6),
    "three times longer": longer(3),
    "nested repeats": split(r"(a+)+$"),
    "repeats of a rare letter": split(r"(ж|ж)+$"),
    "of a class": split(r"(\d+)+$"),
    "a panic": split(r"(a+)+$|(.*)*\1{9999}"),
    "no step of the package": {"pre_tokenizer": {"type": "Nothing"}},
}


def written(folder, change):
    described = json.loads((processor_directory() / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(described | change))
    (folder / "tokenizer_config.json").write_bytes((processor_directory() / "tokenizer_config.json").read_bytes())
    return folder


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE)
def test_what_takes_for_ever_or_all_memory_or_panics_is_refused(tmp_path, change, monkeypatch):
    monkeypatch.setattr(tokenizer_trial, "SECONDS", 1)
    monkeypatch.setattr(tokenizer_trial, "MEMORY", 400 << 20)
    began = time.monotonic()
    with pytest.raises(ModelError, match=r"tokenizer.json: no usable tokenizer: it .* plain texts.*download it again"):
        load_tokenizer(written(tmp_path, change))
    assert time.monotonic() - began < 20


def test_a_file_that_passed_is_not_tried_again(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer_trial, "_passed", set())
    load_tokenizer(written(tmp_path, {"truncation": None}))
    tried = []
    monkeypatch.setattr(subprocess, "run", lambda *command, **_: tried.append(command))
    for _ in range(2):
        load_tokenizer(tmp_path)
        tokenizer_trial._passed.clear()  # as another process
    assert tried == []
