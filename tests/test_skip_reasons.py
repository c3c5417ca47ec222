"""A run of the tests says what it left out."""

from types import SimpleNamespace

from skip_reasons import skip_lines


def test_each_reason_is_a_line_with_the_number_of_its_tests():
    said = ["Skipped: needs a CUDA device", "Skipped: slow: set RUN_SLOW=1", "Skipped: slow:\n  set RUN_SLOW=1"]
    reports = [SimpleNamespace(longrepr=("tests/a.py", line, reason)) for line, reason in enumerate(said)]
    lines = skip_lines([*reports, SimpleNamespace(longrepr="Skipped: nginx is not installed")])
    assert lines == [
        "skipped 2: slow: set RUN_SLOW=1", "skipped 1: needs a CUDA device", "skipped 1: nginx is not installed"
    ]  # fmt: skip
    assert skip_lines([]) == []
