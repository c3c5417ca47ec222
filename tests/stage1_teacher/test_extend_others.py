"""What an extension must not take for its own: texts that records are not of, and files and folders of other people."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from vlm_distill_cache.common.errors import CacheMismatchError, ConfigError
from vlm_distill_cache.common.files.atomic import exchange_folders, hold_folder
from vlm_distill_cache.common.opening import open_cache
from vlm_distill_cache.common.tools import verify as verifying
from vlm_distill_cache.common.tools.repair import repair
from vlm_distill_cache.common.tools.verify import verify
from vlm_distill_cache.stage1_teacher import extract as extracting
from vlm_distill_cache.stage1_teacher.config import BuildConfig
from vlm_distill_cache.stage1_teacher.demo.teacher import builtin_teacher_directory
from vlm_distill_cache.stage1_teacher.extend import Extension, extend
from vlm_distill_cache.stage1_teacher.extract import extract, extract_with_processes
from vlm_distill_cache.stage1_teacher.report import extension_text

Entry = dict[str, object]


def entry(name: str, question: str, answer: str = "red", *, picture: bool = True, system: str = "") -> Entry:
    turns = [{"from": "human", "value": f"{'<image>' * picture}{question}"}, {"from": "gpt", "value": answer}]
    turns = [*([{"from": "system", "value": system}] if system else []), *turns]
    return {"id": name, "conversations": turns, **({"image": "one.png"} if picture else {})}


def write(folder: Path, entries: list[Entry]) -> str:
    folder.mkdir(exist_ok=True)
    Image.new("RGB", (40, 30), (200, 80, 90)).save(folder / "one.png")
    (folder / "data.json").write_text(json.dumps(entries))
    return str(folder / "data.json")


def built(cache: Path, data: str, **options: object) -> Path:
    settings = {"shard_size": 4, "batch_size": 2, "fidelity_samples": 0, "max_failed_share": 0.5, "threads": 1}
    settings |= {"teacher": str(builtin_teacher_directory()), "signals": ("logits",), **options}
    extract(BuildConfig(cache=str(cache), data=data, **settings))
    return cache


def more(cache: Path, data: str, *signals: str) -> Extension:
    options = {"data": data, "teacher": str(builtin_teacher_directory()), "fidelity_samples": 0, "threads": 1}
    options |= {"signals": signals} if signals else {}
    return extend(BuildConfig(cache=str(cache), **options), given=options)


def tree(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


ASKED = [
    entry("a", "what color is the circle ?"),
    entry("b", "is there a square ?", "no"),
    entry("a", "what shape is red ?", "circle"),  # is called a#2
    entry("c", "what color is the sky ?", picture=False),
]
BROKEN = {"id": "d", "image": "one.png", "conversations": [{"from": "human", "value": "<image>?"}]}
NEW = entry("e", "is there a circle ?", "yes")


def changed(place: int, question: str, **options: object) -> list[Entry]:
    answer = ASKED[place]["conversations"][1]["value"]
    other = entry(str(ASKED[place]["id"]), question, answer, picture="image" in ASKED[place], **options)
    return [*ASKED[:place], other, *ASKED[place + 1 :]]


@pytest.mark.slow
def test_other_texts_than_those_of_the_records_are_refused_and_the_same_ones_wherever_new_ones_stand_are_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """With a signal more and with samples more; questions, system prompts, texts without pictures, ids that are given twice."""
    whole = built(tmp_path / "whole", write(tmp_path / "whole-data", ASKED))
    before = tree(whole)
    others = [
        changed(0, "is there a square ?"),
        changed(1, "is there a square ?", system="be brief"),
        changed(3, "what color is the grass ?"),
        [ASKED[2], ASKED[1], ASKED[0], ASKED[3]],
    ]
    for entries in others:
        for given in (entries, [NEW, *entries]):
            data = write(tmp_path / "other", given)
            with pytest.raises(
                CacheMismatchError, match=r"a question|something else of sample|another answer|no place for"
            ):
                more(whole, data, "hidden")
    assert tree(whole) == before
    same_in_another_order = write(tmp_path / "order", [ASKED[3], ASKED[1], ASKED[0], ASKED[2]])
    with pytest.raises(CacheMismatchError, match="for data in another order"):
        more(whole, same_in_another_order)
    more(whole, same_in_another_order, "hidden")
    assert (
        tree(whole).keys()
        == tree(built(tmp_path / "again", same_in_another_order, signals=("logits", "hidden"))).keys()
    )
    assert more(whole, write(tmp_path / "new", [ASKED[3], NEW, *ASKED[1:2], ASKED[0], ASKED[2]])).samples == 1

    # A text that could not be read has changed or is gone: where the fingerprint proves nothing, the teacher is asked.
    part = built(tmp_path / "part", write(tmp_path / "part-data", [BROKEN, *ASKED]))
    shutil.copytree(part, tmp_path / "gone")
    mended = entry("d", "what color is the circle ?")
    with pytest.raises(CacheMismatchError, match=r"something else of sample 'b'.*moved, expected at most 0.05"):
        more(part, write(tmp_path / "other", [mended, *changed(1, "what color is the circle ?")]))
    with caplog.at_level(logging.WARNING):
        assert more(part, write(tmp_path / "mended", [mended, *ASKED])).samples == 1
    assert "fingerprint does not prove" not in caplog.text
    with caplog.at_level(logging.WARNING):
        gone = more(tmp_path / "gone", write(tmp_path / "fewer", ASKED))
    assert "Added: nothing; 1 failed samples are no longer in the data" in extension_text(gone)
    assert "the teacher read 4 of 4 again" in caplog.text
    assert not open_cache(tmp_path / "gone").failed


@pytest.mark.parametrize("hidden", ["", "1"])
def test_several_processes_build_without_a_bar_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hidden: str):
    def one_by_one(
        build: Callable[..., object], config: BuildConfig, parts: list[object], show: Callable[[], None]
    ) -> None:
        for part in parts:
            build(config, part)
            show()

    monkeypatch.setenv("TQDM_DISABLE", hidden)
    monkeypatch.setattr(extracting, "run_parts", one_by_one)
    config = BuildConfig(
        cache=str(tmp_path / "cache"), data=write(tmp_path / "data", ASKED), teacher=str(builtin_teacher_directory()),
        signals=("logits",), shard_size=2, batch_size=1, fidelity_samples=0,
    )  # fmt: skip
    assert extract_with_processes(config, 2).samples == 4
    assert verify(tmp_path / "cache") == []


def test_files_and_folders_of_others_stay_where_they_are_or_stop_the_extension(tmp_path: Path):
    data = write(tmp_path / "data", ASKED)
    cache = built(tmp_path / "cache", data)
    copied = ("cache.before-mine", "cache.before-000000000000", "cache.extending-000000000000")
    for name in copied:
        shutil.copytree(cache, tmp_path / name)
    (tmp_path / ".tmp-cache.notes").write_text("mine")
    kept = {name: tree(tmp_path / name) for name in copied}
    for signal in ("hidden", "visual_hidden"):
        before = more(cache, data, signal).before
    assert before is not None
    assert {name: tree(tmp_path / name) for name in copied} == kept
    assert (tmp_path / ".tmp-cache.notes").exists()
    assert len(list(tmp_path.glob("cache.before-*"))) == 3

    (before / "notes.txt").write_text("mine")  # so that it is more than a version of the cache
    more(cache, data, "projector_output")
    assert (before / "notes.txt").exists()
    for place in (cache, cache / "shards"):
        (place / "mine.txt").write_text("mine")
        with pytest.raises(ConfigError, match=r"holds .*mine.txt, which is not part .*move that elsewhere"):
            more(cache, data, "text_attention")
        (place / "mine.txt").unlink()
    taken = tmp_path / f"cache.before-{open_cache(cache).manifest_hash[:12]}"
    taken.mkdir()
    (taken / "mine.txt").write_text("mine")
    sound = tree(cache)
    with pytest.raises(ConfigError, match=f"{taken.name}: is in the place of what .* move it elsewhere"):
        more(cache, data, "text_attention")
    assert tree(cache) == sound


def test_a_cache_that_takes_its_place_meanwhile_is_never_called_damaged_or_repaired(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    data = write(tmp_path / "data", ASKED)
    cache, new = built(tmp_path / "cache", data, shard_size=1), built(tmp_path / "new", data, limit=2)
    look: Callable[..., object] = verifying.verify_shard
    looked = []

    def exchange_once(*arguments: object, **options: object) -> object:
        looked.append(arguments)
        if len(looked) == 2:
            exchange_folders(new, cache)
        return look(*arguments, **options)

    monkeypatch.setattr(verifying, "verify_shard", exchange_once)
    assert verify(cache) == []
    assert len(looked) == 5  # four shards, and the one of the other cache
    with hold_folder(cache, alone=False, busy="a build"), pytest.raises(ConfigError, match="another command builds"):
        repair(cache)
    assert repair(cache) == []
