"""Of stacks that py-spy has seen: which function was on top how often, and that the page shows what is stored."""

import json

import pytest

from tests.benchmarks.bench_docs import ROOT, TABLE_PAGE, table_in
from tests.benchmarks.profile_loops import BEGIN, END, LOOPS, STORED, entitled, graph_of, on_top, read_stacks, table


def test_looks_are_counted_by_function_and_imports_are_left_out():
    text = (
        "main (a.py:1);step (b.py:7) 3\n"
        "main (a.py:1);step (b.py:8) 2\n"
        "main (a.py) 1\n"
        "main (a.py);_find_and_load (<frozen importlib._bootstrap>);step (b.py) 50\n"
        " 70\n"
        "main (a.py:1);forward (torch/nn.py:12) 4\n"
    )
    shares = on_top(read_stacks(text))
    assert [*shares] == ["step (b.py)", "forward (torch/nn.py)", "main (a.py)"]
    assert [*shares.values()] == pytest.approx([50.0, 40.0, 10.0])


def test_the_table_in_the_documentation_is_that_of_the_stored_profile():
    stored = json.loads(STORED.read_text())
    assert table_in((ROOT / TABLE_PAGE).read_text(), BEGIN, END) == table(stored)
    for loop in LOOPS:
        graph = graph_of(loop).read_text()
        assert graph.startswith("<?xml")
        assert "--output" not in graph  # the command, with folders of the machine that it ran on
        assert entitled(graph, LOOPS[loop]) == graph
        shares = [*stored["on_top"][loop].values()]
        assert shares == sorted(shares, reverse=True)
        assert sum(shares) <= 100
