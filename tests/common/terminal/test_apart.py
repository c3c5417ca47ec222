"""Work in a process of its own: its result, its errors, and its end."""

import os
import signal
import threading
from multiprocessing.popen_fork import Popen

import pytest
from apart_targets import die, double, refuse

from vlm_distill_cache.common.errors import ConfigError, ProcessFailedError
from vlm_distill_cache.common.terminal.processes import run_apart, start_beside


def test_the_result_comes_from_another_process_that_is_gone():
    number, process = run_apart(double, 21, name="doubles")
    assert number == 42
    assert process != os.getpid()
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)


def test_an_error_for_people_is_raised_as_it_is_here():
    with pytest.raises(ConfigError, match=r"^seven: expected an even number$"):
        run_apart(refuse, "seven", name="refuses")


def test_a_process_that_dies_is_an_error_that_says_how():
    with pytest.raises(ProcessFailedError, match=r"the process that plans failed: it was killed by SIGKILL"):
        run_apart(die, int(signal.SIGKILL), name="plans")


def test_the_end_of_a_process_beside_is_told_though_its_exit_code_comes_later(monkeypatch):
    poll = Popen.poll

    def late(self: Popen, flag: int = os.WNOHANG) -> int | None:
        return self.returncode if flag == os.WNOHANG else poll(self, flag)  # known only to who waits for it

    monkeypatch.setattr(Popen, "poll", late)
    said, told = [], threading.Event()

    def on_end(what: str) -> None:
        said.append(what)
        told.set()

    close = start_beside("apart_targets", "die", [("rank 1 of 2", (int(signal.SIGKILL),))], on_end=on_end)
    assert told.wait(60)
    close()
    assert said[0].startswith("the process of rank 1 of 2 failed: it was killed by SIGKILL")
