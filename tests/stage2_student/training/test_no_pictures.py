"""A loss on pictures that meets none is refused before training; few pictures are said."""

import json
import re

import pytest
from PIL import Image
from test_check_cache import make_config
from tiny_cache import build_tiny_cache

from vlm_distill_cache.common.cache.documents import document_bytes, read_document
from vlm_distill_cache.common.cache.manifest import seal
from vlm_distill_cache.common.cache.sidecar import read_sidecar, sidecar_path
from vlm_distill_cache.common.errors import CacheMismatchError
from vlm_distill_cache.common.opening import open_cache
from vlm_distill_cache.data.registry import open_dataset
from vlm_distill_cache.stage2_student.losses.terms import TERMS
from vlm_distill_cache.stage2_student.run import run
from vlm_distill_cache.stage2_student.training.checks import check_losses
from vlm_distill_cache.stage2_student.training.preparation import cache_notes, prepare

LOSSES = ("answer_attention", "visual_columns", "visual_map", "text_attention", "all_attention")
SIGNALS = ("logits", "answer_attention", "visual_columns", "visual_map", "text_attention")


def write_data(folder, pictures: list[bool]) -> str:
    entries = []
    for index, has_picture in enumerate(pictures):
        mark = "<image>\n" if has_picture else ""
        question = {"from": "human", "value": f"{mark}what color is the square ?"}
        entry = {"id": f"s{index}", "conversations": [question, {"from": "gpt", "value": "red"}]}
        if has_picture:
            entry["image"] = f"{index}.png"
            Image.new("RGB", (30, 30), (index, 80, 90)).save(folder / f"{index}.png")
        entries.append(entry)
    (folder / "data.json").write_text(json.dumps(entries))
    return str(folder / "data.json")


def make(folder, pictures: list[bool], *, older=False, **losses) -> object:
    """A configuration on a new cache of samples with and without pictures, in shards of 3."""
    data = write_data(folder, pictures)
    build_tiny_cache(folder / "c", data=data, dataset=open_dataset(data), signals=SIGNALS, shard_size=3)
    if older:
        for shard in range(-(-len(pictures) // 3)):
            body = read_document(sidecar_path(folder / "c", shard))
            del body["pictures"]
            sidecar_path(folder / "c", shard).write_bytes(document_bytes(body))
        seal(folder / "c")
        assert read_sidecar(folder / "c", 0).pictures is None
    weights = {"logits": 1.0, **losses}
    return make_config(
        folder / "c", folder / "run", data=data, phases=["dpt", "dft"],
        **{name: {"steps": 1, "losses": weights} for name in ("dpt", "dft")},
    )  # fmt: skip


@pytest.mark.parametrize("older", [False, True], ids=["counted", "of an older version"])
def test_losses_on_pictures_are_refused_where_no_sample_has_one_and_the_remedy_switches_them_off(tmp_path, older):
    config = make(tmp_path, [False] * 4, older=older, **dict.fromkeys(LOSSES, 1.0))
    with pytest.raises(CacheMismatchError, match="no sample that is trained on has a picture") as caught:
        prepare(config)
    said = str(caught.value)
    off = re.findall(r"--set (\S+=0)", said)
    assert off == [f"{phase}.losses.{loss}=0" for phase in ("dpt", "dft") for loss in TERMS if loss in LOSSES]
    assert f'SET="{" ".join(off)}" with make' in said
    without = make_config(
        tmp_path / "c", data=config.data, phases=["dpt", "dft"],
        **{name: {"steps": 1, "losses": {"logits": 1.0}} for name in ("dpt", "dft")},
    )  # fmt: skip
    assert [phase.steps for phase in prepare(without).phases] == [1, 1]


def test_it_is_refused_without_a_student_and_before_the_baseline(tmp_path):
    config = make(tmp_path, [False] * 4, answer_attention=1.0)
    with pytest.raises(CacheMismatchError, match="answer_attention"):
        check_losses(config, {config.cache: open_cache(config.cache)})
    with pytest.raises(CacheMismatchError, match="answer_attention"):
        run(config)
    assert not (tmp_path / "run" / "sft").exists()


@pytest.mark.parametrize("older", [False, True], ids=["counted", "of an older version"])
@pytest.mark.parametrize("at", [0, 4, 6])
def test_one_picture_is_enough_and_is_said_to_be_few(tmp_path, at, older):
    config = make(tmp_path, [place == at for place in range(7)], older=older, answer_attention=1.0)
    prepared = prepare(config)
    assert prepared.phases[1].dataset.has_pictures()
    notes = cache_notes(config, {config.cache: open_cache(config.cache)})
    few = [note for note in notes if "1 of 7 samples with a picture: answer_attention learn from these alone" in note]
    assert len(few) == (0 if older else 1)


def test_only_the_samples_that_are_trained_on_count(tmp_path):
    config = make(tmp_path, [False] * 4 + [True] * 3, answer_attention=1.0)
    prepare(config)
    limited = make_config(
        tmp_path / "c", data=config.data, limit=4,
        dft={"steps": 1, "losses": {"logits": 1.0, "answer_attention": 1.0}},
    )  # fmt: skip
    with pytest.raises(CacheMismatchError, match=r"no sample that is trained on .* by answer_attention"):
        prepare(limited)


def test_where_most_samples_have_pictures_nothing_is_said(tmp_path):
    config = make(tmp_path, [True, True, False], answer_attention=1.0)
    assert cache_notes(config, {config.cache: open_cache(config.cache)}) == []
