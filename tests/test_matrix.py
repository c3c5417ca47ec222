"""Library versions: what pyproject.toml allows is what was run, and results are counted as pytest reports them."""

import json

from tests.benchmarks.matrix import ENDS, RESULTS, bounds, count, table


def test_every_lower_bound_was_run_and_nothing_failed():
    results = json.loads(RESULTS.read_text())
    assert {*results} == {*ENDS}
    for end in ENDS:
        assert results[end]["failed"] == []
        assert results[end]["passed"] > 100
        assert results[end]["versions"].keys() == bounds().keys()
    for name, bound in bounds().items():
        ran = results["oldest"]["versions"][name]
        assert f"{ran}.".startswith(f"{bound}."), f"{name}>={bound}, but {ran} was the oldest that ran: make matrix"


def test_a_report_is_counted_by_what_became_of_each_test(tmp_path):
    cases = [
        '<testcase classname="a" name="one"/>', '<testcase classname="a" name="two"><failure message="no"/></testcase>',
        '<testcase classname="a" name="three"><skipped message="needs a GPU"/></testcase>',
        '<testcase classname="b" name="four"><error message="no"/></testcase>',
    ]  # fmt: skip
    (tmp_path / "report.xml").write_text(f"<testsuites><testsuite>{''.join(cases)}</testsuite></testsuites>")
    found = count(tmp_path / "report.xml")
    assert found == {"passed": 1, "failed": ["a::two", "b::four"], "skipped": {"needs a GPU": 1}}
    shown = table({"newest": {"python": "3.11.7", "versions": {"torch": "2.13.0"}, **found}})
    assert "| torch | 2.13.0 |" in shown
    assert "1 passed, 2 failed" in shown
