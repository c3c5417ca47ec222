"""Several processes on one cache: what each builds, who seals, and that the bytes do not depend on their number."""

import logging
import multiprocessing
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from part_targets import fail_or_wait

import vlm_distill_cache.stage1_teacher.extract as extracting
from vlm_distill_cache.common.cache.plan import read_plan
from vlm_distill_cache.common.errors import CacheMismatchError, ConfigError, ProcessFailedError
from vlm_distill_cache.common.terminal.launch import ALONE, Launch
from vlm_distill_cache.common.terminal.processes import _raise_failure
from vlm_distill_cache.stage1_teacher.cli import main
from vlm_distill_cache.stage1_teacher.config import BuildConfig
from vlm_distill_cache.stage1_teacher.extract import _progress, extract, extract_with_processes
from vlm_distill_cache.stage1_teacher.planning import open as opening
from vlm_distill_cache.stage1_teacher.planning.parts import (
    ANY,
    WHOLE,
    Part,
    choose_part,
    fix_threads,
    local_device,
    parse_part,
    refuse_shared_gpus,
    run_parts,
)
from vlm_distill_cache.stage1_teacher.planning.plan import teacher_directory
from vlm_distill_cache.stage1_teacher.report import summary_text


def tree(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


@pytest.fixture
def config(tiny_llava: Path):
    """Options of a cache of five shards; keyword arguments are further ones."""

    def build(cache: Path, **options) -> BuildConfig:
        settings = {"template": "short", "limit": 10, "shard_size": 2, "batch_size": 2, "fidelity_samples": 1,
                    "signals": ("logits",)} | options  # fmt: skip
        return BuildConfig(cache=str(cache), teacher=str(tiny_llava), **settings)

    return build


@pytest.fixture(autouse=True)
def restore_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("of", [1, 2, 3, 7])
def test_every_shard_has_one_part_and_processes_divide_a_part(of: int):
    missing = [0, 1, 2, 5, 6, 9, 12]
    shares = [Part(rank=rank, of=of).share(missing) for rank in range(of)]
    assert Counter(index for share in shares for index in share) == Counter(missing)
    for rank, share in enumerate(shares):
        divided = [part.share(missing) for part in Part(rank=rank, of=of).split(3)]
        assert sorted(index for part in divided for index in part) == share


def test_a_part_whose_own_shards_are_finished_builds_what_others_left():
    part = Part(rank=1, of=2)
    assert part.for_resume([0, 1, 4]).share([0, 1, 4]) == [1]
    assert part.for_resume([0, 4]).share([0, 4]) == [4, 0]  # from the other end than their own part
    assert sorted(i for p in part.for_resume([0, 4]).split(2) for i in p.share([0, 4])) == [0, 4]
    assert WHOLE.for_resume([]).share([]) == []


@pytest.mark.parametrize("text", ["", "1", "1/1", "2/2", "-1/2", "0/0", "1/2/3", "a/b", "0/9999999", "all", "Any"])
def test_a_part_that_is_none_is_refused(text: str):
    with pytest.raises(ConfigError, match="part"):
        parse_part(text)


def test_a_part_is_what_is_asked_for_else_of_a_queue_where_a_launcher_started_several(caplog):
    third = Launch(launcher="srun", rank=2, size=4, local=1, names=("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"))
    with caplog.at_level(logging.INFO):
        assert choose_part(None, third) == (ANY, 1)
    assert "one of 4 processes, as srun says (SLURM_PROCID, SLURM_STEP_NUM_TASKS)" in caplog.text
    assert choose_part("0/2", third) == (Part(rank=0, of=2), 1)
    assert choose_part(None, ALONE) == (WHOLE, 0)
    assert choose_part("0/2", ALONE) == (Part(rank=0, of=2), 0)
    assert choose_part("any", ALONE) == (ANY, 0)


def test_each_process_gets_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert [local_device("auto", rank) for rank in range(5)] == [
        "cuda:0",
        "cuda:1",
        "cuda:2",
        "cuda:3",
        "cuda:0",
    ]
    assert local_device("cpu", 1) == "cpu"
    assert local_device("cuda:2", 1) == "cuda:2"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert local_device("auto", 1) == "auto"


def test_the_number_of_threads_is_one_each_for_several_and_then_the_plans(tmp_path: Path, config, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for several in (True, False):
        cores = len(os.sched_getaffinity(0))
        expected = 1 if several else max(1, cores - 1)
        assert fix_threads(config(tmp_path / "none"), several=several).threads == expected
        assert torch.get_num_threads() == expected
    extract(config(tmp_path / "cache", threads=2))
    assert read_plan(tmp_path / "cache").extra["threads"] == 2
    for several in (True, False):
        assert fix_threads(config(tmp_path / "cache"), several=several).threads == 2
        assert torch.get_num_threads() == 2
    assert fix_threads(config(tmp_path / "cache"), several=True, overwrite=True).threads == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert fix_threads(config(tmp_path / "cache", threads=1), several=True).threads == 1
    with pytest.raises(CacheMismatchError, match=r"extra\.threads: the cache has 2, this run has 1"):
        extract(config(tmp_path / "cache", threads=1))


@pytest.mark.parametrize("store", ["webdataset", "zarr"])
@pytest.mark.slow(quick=("webdataset",))
def test_parts_give_the_bytes_of_one_process_and_the_last_one_seals(tmp_path: Path, config, store: str):
    extract(config(tmp_path / "whole", store=store, threads=1))
    for of in (2, 3):
        cache = tmp_path / f"parts-{of}"
        for rank in reversed(range(of)):
            assert not (cache / "manifest.json").exists()
            summary = extract(config(cache, store=store, threads=1), part=Part(rank=rank, of=of))
            assert summary.built == len([i for i in range(5) if i % of == rank])
        assert summary.manifest is not None
        assert tree(cache) == tree(tmp_path / "whole")


def test_a_part_says_what_is_missing_and_that_any_part_can_finish_it(tmp_path: Path, config):
    first = extract(config(tmp_path / "cache"), part=Part(rank=0, of=2))
    assert first.missing == (1, 3)
    assert "Part 0/2 done: this run built 3 shards" in summary_text(first)
    assert "2 shards are still missing (1, 3); they are built by the other parts" in summary_text(first)
    assert "(parts count from 0: 0/2 to 1/2)" in summary_text(first)
    assert f"cachectl merge {tmp_path / 'cache'} FOLDER_OF_ANOTHER_PART" in summary_text(first)
    assert extract(config(tmp_path / "cache"), part=Part(rank=0, of=2)).built == 2  # the other one never came
    assert (tmp_path / "cache" / "manifest.json").exists()


def test_a_parts_progress_counts_its_own_samples():
    plan = SimpleNamespace(shard_count=5, shard_range=lambda index: range(index * 2, min(index * 2 + 2, 9)))
    for part, todo, seen in (
        (Part(rank=0, of=2), [0, 2, 4], (5, 0)),
        (Part(rank=1, of=2), [3], (4, 2)),
        (WHOLE, [4], (9, 8)),
        (Part(rank=0, of=2, takes_all=True), [3, 1], (9, 5)),
    ):
        with _progress(plan, part, todo, shown=True) as bar:
            assert (bar.total, bar.initial) == seen


def test_an_unfinished_cache_of_own_data_says_that_its_teacher_continues_it(tmp_path: Path, config, tiny_llava):
    extract(config(tmp_path / "cache"), part=Part(rank=0, of=2))
    with pytest.raises(ConfigError, match=f"unfinished cache of the teacher {tiny_llava.name} .* TEACHER=FOLDER"):
        teacher_directory(teacher="", data="my.json", scratch=tmp_path, cache=tmp_path / "cache")
    with pytest.raises(ConfigError, match="no teacher given"):
        teacher_directory(teacher="", data="my.json", scratch=tmp_path, cache=tmp_path / "other")


def test_one_process_gives_the_bytes_of_a_build_without_any(tmp_path: Path, config):
    check_processes(tmp_path, config, "webdataset", (1,))


@pytest.mark.slow
def test_two_processes_give_the_bytes_of_one_and_share_the_batch_size_that_the_first_found(
    tmp_path: Path, config, monkeypatch
):
    monkeypatch.setattr(opening, "automatic_batch_size", lambda *_: 2)  # in this process alone
    check_processes(tmp_path, lambda cache, **options: config(cache, batch_size=0, **options), "zarr", (1, 2))


@pytest.mark.slow
@pytest.mark.parametrize("store", ["webdataset", "zarr"])
def test_one_two_and_three_processes_give_the_same_bytes(tmp_path: Path, config, store: str):
    check_processes(tmp_path, config, store, (1, 2, 3))


def check_processes(tmp_path: Path, config, store: str, numbers: tuple[int, ...]) -> None:
    extract(config(tmp_path / "whole", store=store, threads=1))
    for number in numbers:
        cache = tmp_path / f"processes-{number}"
        summary = extract_with_processes(config(cache, store=store, threads=1), number)
        assert (summary.built, summary.samples) == (5, 10)
        assert tree(cache) == tree(tmp_path / "whole")
        assert extract_with_processes(config(cache, store=store), 2).built == 0  # complete: no process is started


def test_the_first_failure_is_shown_whole_and_the_others_are_stopped(tmp_path: Path, config):
    with pytest.raises(ProcessFailedError, match=r"process of part 1/2 failed: disk of part 1/2 melted") as caught:
        run_parts(fail_or_wait, config(tmp_path), WHOLE.split(2), lambda: None)
    assert "The others were stopped; finished shards are kept" in str(caught.value)


def test_no_process_outlives_a_parent_that_was_killed():
    script = Path(__file__).parents[1] / "part_targets.py"
    with subprocess.Popen(
        [sys.executable, script], stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(script.parents[2])},
    ) as parent:  # fmt: skip
        child = int(parent.stdout.readline())
        parent.kill()
    for _ in range(600):
        if not is_running(child):
            break
        time.sleep(0.1)
    assert not is_running(child)


def is_running(process: int) -> bool:
    """Whether a process is there and no zombie that nobody has waited for."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize(("code", "told"), [(-9, "killed by SIGKILL; .* memory ran out"), (3, "exit code 3")])
def test_a_process_that_died_without_a_word_is_described_by_its_end(code: int, told: str):
    here, there = multiprocessing.get_context("spawn").Pipe(duplex=False)
    there.close()
    with pytest.raises(ProcessFailedError, match=rf"(?s)part 1/2 failed: .*{told}"):
        _raise_failure("part 1/2", SimpleNamespace(exitcode=code), here, kept="")
    here.close()


@pytest.mark.parametrize("part", ["0/2", "any"])
def test_overwriting_is_not_for_one_of_several_parts(tmp_path: Path, part: str):
    result = CliRunner().invoke(main, ["build", "--cache", str(tmp_path), "--part", part, "--overwrite"])
    assert result.exit_code == 2
    assert "without --part" in result.output


def test_more_processes_than_gpus_are_refused_before_anything_is_opened(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for device, said in (("auto", "2 are here"), ("cuda", "2 are here"), ("cuda:1", "device=cuda:1 is one")):
        config = BuildConfig(cache=str(tmp_path / "none"), device=device)
        with pytest.raises(
            ConfigError, match=rf"--nproc 3: each process has a GPU of its own, and {said}; start as many"
        ):
            extract_with_processes(config, 3)
    found = CliRunner().invoke(main, ["build", "--cache", str(tmp_path / "none"), "--nproc", "3"])
    assert "--nproc 3: each process has a GPU of its own" in found.output
    assert not (tmp_path / "none").exists()
    for config, processes in (
        (BuildConfig(device="cpu"), 3),
        (BuildConfig(device="cuda"), 2),
        (BuildConfig(device="cuda:1"), 1),
    ):
        refuse_shared_gpus(config, processes)


@pytest.mark.slow
def test_the_plan_of_several_processes_on_gpus_is_made_in_a_process_that_ends_before_they_begin(
    tmp_path: Path, config, monkeypatch
):
    """Else the parent would keep a context, and half a gigabyte, on the first GPU while they build."""
    extract_with_processes(config(tmp_path / "whole"), 2)
    here: list[str] = []
    begin, run = extracting.begin, extracting.run_parts

    def note_begin(*arguments, **named):
        here.append("begin")
        return begin(*arguments, **named)

    def note_run(*arguments):
        here.append("parts")
        return run(*arguments)

    monkeypatch.setattr(extracting, "begin", note_begin)
    monkeypatch.setattr(extracting, "run_parts", note_run)
    monkeypatch.setattr(extracting, "uses_gpu", lambda _: True)
    extract_with_processes(config(tmp_path / "cache"), 2)
    assert here == ["parts", "begin"]  # to seal it
    assert tree(tmp_path / "cache") == tree(tmp_path / "whole")
    with pytest.raises(CacheMismatchError, match="batch_size: the cache has 2, this run has 1"):
        extract_with_processes(config(tmp_path / "cache", batch_size=1), 2)
