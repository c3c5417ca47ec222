"""What is shown of long work: in files and pipes lines without carriage returns; each text is logged once."""

import io
import logging
import subprocess
import sys

import pytest

from vlm_distill_cache.common.terminal import command_line, progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_where_nobody_watches_a_line_every_30_seconds_and_one_at_the_end(clock, capsys):
    with progress.progress("teacher", total=100, initial=20, unit="sample") as bar:
        for _ in range(8):
            clock[0] += 10
            bar.update(10)
    said = capsys.readouterr().err
    assert "\r" not in said
    lines = said.splitlines()
    assert [line.split()[1] for line in lines] == ["50/100", "80/100", "100/100"]
    assert lines[0].startswith("teacher: 50/100 samples, 50 %, 00:30 elapsed, 00:50 left, 1.00 sample/s")


def test_short_steps_and_unknown_totals_have_lines_too(clock, capsys):
    with progress.progress("questions", total=3, unit="item", keep=False) as bar:
        bar.update(3)
    assert capsys.readouterr().err == ""
    with progress.progress("importance", unit="sample") as bar:
        clock[0] += 40
        bar.update()
    said = capsys.readouterr().err.splitlines()[0]
    assert said.startswith("importance: 1 samples, 00:40 elapsed")
    assert said.endswith(" 40.00 s/sample")


def test_a_terminal_gets_a_bar_and_a_silent_process_nothing(monkeypatch):
    for shown in (True, False):
        monkeypatch.setattr(sys, "stderr", Terminal())
        with progress.progress("dft", total=2, unit="step", shown=shown) as bar:
            bar.update(2)
        assert ("\r" in sys.stderr.getvalue()) == shown


def test_a_text_is_logged_once_a_process_and_not_again_by_one_it_starts(monkeypatch):
    once = command_line._Once()

    def passes(text, level=logging.WARNING, by=once):
        return by.filter(logging.LogRecord("x", level, __file__, 1, text, None, None))

    assert [passes("a"), passes("a"), passes("b")] == [True, False, True]
    assert [passes("c", logging.ERROR) for _ in range(2)] == [True, True]
    monkeypatch.setattr(command_line, "_once", once)
    monkeypatch.setenv(*command_line.said_so_far().popitem())
    there = command_line._Once()
    assert [passes("a", by=there), passes("new", by=there)] == [False, True]


def test_libraries_warn_and_tell_no_progress():
    def passes(name, level):
        return command_line._Once().filter(logging.LogRecord(name, level, "", 0, "a text", (), None))

    for name in ("vlm_distill_cache.common.hub", "__main__"):
        assert passes(name, logging.INFO)
    for name in ("huggingface_hub", "/x/huggingface_hub/serialization/_torch.py"):
        assert [passes(name, level) for level in (logging.INFO, logging.WARNING)] == [False, True]


def test_python_warnings_and_the_model_librarys_are_said_once_too():
    code = (
        "import warnings\n"
        "from vlm_distill_cache.common.terminal.command_line import quiet_libraries, start_logging\n"
        "start_logging()\nquiet_libraries()\n"
        "for _ in range(2):\n"
        "    with warnings.catch_warnings():\n"
        "        warnings.simplefilter('always')\n"
        "        warnings.warn_explicit('slow', UserWarning, 'f.py', 1)\n"
        "from transformers.utils import logging\n"
        "for _ in range(2):\n    logging.get_logger('transformers.x').warning('old weights')\n"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stderr
    assert said.count("slow") == 1
    assert said.count("old weights") == 1


def test_bytes_are_shortened(clock, capsys):
    with progress.progress("pull", unit="B", unit_scale=True) as bar:
        bar.total = 5_000_000
        clock[0] += 31
        bar.update(2_000_000)
    assert capsys.readouterr().err.splitlines()[0].startswith("pull: 2.00M/5.00MB, 40 %")
