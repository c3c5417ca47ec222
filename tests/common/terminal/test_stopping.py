import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from vlm_distill_cache.common.terminal.command_line import PARENT, run_command, stopped_by_sigterm
from vlm_distill_cache.stage2_student import cli


def test_a_process_that_is_forked_inside_ends_without_a_word(capfd):
    with stopped_by_sigterm():
        child = os.fork()
        if not child:
            signal.raise_signal(signal.SIGTERM)
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 143
    assert capfd.readouterr() == ("", "")


def test_sigterm_unwinds_with_143_and_the_handler_is_put_back():
    before, cleaned = signal.getsignal(signal.SIGTERM), []

    def work():
        with stopped_by_sigterm():
            try:
                signal.raise_signal(signal.SIGTERM)
            finally:
                cleaned.append(True)

    with pytest.raises(SystemExit) as caught:
        work()
    assert (caught.value.code, cleaned) == (143, [True])
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("command", [["evaluate", "x"], ["export", "x", "--output", "y"], ["train", "--cache", "x"]])
def test_each_command_says_that_sigterm_ended_it(command, monkeypatch, caplog):
    def end(*_, **__):
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(cli, "trained_folder", end)
    monkeypatch.setattr(cli, "_load", end)
    monkeypatch.delenv(PARENT, raising=False)
    before = signal.getsignal(signal.SIGTERM)
    assert CliRunner().invoke(cli.main, command).exit_code == 143
    assert "stopped by SIGTERM; run the same command again to continue" in caplog.text
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_command_ends_with_the_process_that_waits_for_it(tmp_path: Path, monkeypatch):
    code = "open('pid', 'w').write(str(os.getpid())); os.kill(os.getppid(), signal.SIGTERM); time.sleep(20); open('late', 'w')"

    def work():
        with stopped_by_sigterm():
            run_command([sys.executable, "-c", f"import os, signal, time; {code}"], os.environ)

    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        work()
    child = int((tmp_path / "pid").read_text())
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)
    assert not (tmp_path / "late").exists()  # it was ended, not waited for


def test_a_commands_exit_code_and_environment():
    code = "import os; raise SystemExit(int(os.environ['CODE']))"
    assert run_command([sys.executable, "-c", code], {"CODE": "7"}) == 7


def test_what_a_command_started_ends_with_it_even_if_it_is_killed(tmp_path: Path):
    """A launcher, and what that one starts in its turn."""
    head = "import os, sys, time; from vlm_distill_cache.common.terminal.command_line import end_with_parent, run_command\n"
    head += "def begin(): end_with_parent(); print(os.getpid(), file=open(os.environ['PIDS'], 'a'))\n"
    head += "def start(code): run_command([sys.executable, '-c', code], os.environ)\n"
    leaf = head + "begin(); time.sleep(60)"
    starts = head + f"begin(); start({leaf!r})"
    top = head + f"start({starts!r})"
    pids = tmp_path / "pids"
    process = subprocess.Popen([sys.executable, "-c", top], env=os.environ | {"PIDS": str(pids)})
    deadline = time.monotonic() + 60
    while not pids.exists() or pids.read_text().count("\n") < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.kill()
    process.wait()
    left = [int(pid) for pid in pids.read_text().split()]
    while left and time.monotonic() < deadline:
        left = [pid for pid in left if _runs(pid)]
        time.sleep(0.05)
    assert left == []


def _runs(pid: int) -> bool:
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


def test_ctrl_c_after_the_last_word_shows_nothing():
    """What libraries clean up when the interpreter ends has nothing to continue."""
    code = (
        "import atexit, signal, click\n"
        "atexit.register(signal.raise_signal, signal.SIGINT)\n"
        "from vlm_distill_cache.common.terminal.command_line import CommandGroup, say\n"
        "@click.group(cls=CommandGroup)\n"
        "def main(): pass\n"
        "main.command('done')(lambda: say('done'))\n"
        "main(['done'])"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (ended.stdout, ended.stderr) == ("done\n", "")
