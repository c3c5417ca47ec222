import os
import signal
import sys
from pathlib import Path

import pytest

from vlm_distill_cache.common.terminal.command_line import run_command, stopped_by_sigterm


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
