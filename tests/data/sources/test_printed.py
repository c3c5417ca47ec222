"""Lists that texts hold, in all the ways in which libraries print them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vlm_distill_cache.common.errors import SampleError
from vlm_distill_cache.data.sources.csv_rows import CsvRows
from vlm_distill_cache.data.sources.options import with_options
from vlm_distill_cache.data.sources.printed import printed
from vlm_distill_cache.data.sources.rows import with_rows

LISTS: list[list[Any]] = [
    ["0.28", ".28"],
    ["New York", "new york city"],
    ["it's", 'say "so"', "'' ''", "[x]", "a, b", ""],
    ["one"],
    ["line\nbreak", "back\\slash"],
    ["long " * 20] * 8,
    [{"answer": "a", "sure": True}, {"answer": "b", "sure": None}],
    [1, -2, 3],
    [1.5, -2.0],
    [],
]


@pytest.mark.parametrize("values", LISTS, ids=str)
def test_what_python_and_numpy_print_is_read_back(values: list[Any]) -> None:
    objects = np.empty(len(values), dtype=object)
    objects[:] = values
    arrays = [objects] if values and isinstance(values[0], dict) else [objects, np.array(values)]
    for value in (values, *arrays):
        for text in (str(value), repr(value)):
            assert printed(text) == values
    assert printed(repr({"text": objects, "count": 2})) == {"text": values, "count": 2}


def test_plain_texts_are_none() -> None:
    texts = (
        "yes",
        "[illegible]",
        "[New York]",
        "(1, 2)",
        "array of stars",
        "[a] and ['b']",
        "['it''s']",
        "[007 012]",
        "[1], [2]",
        "[",
    )
    assert [printed(text) for text in texts] == [None] * len(texts)
    assert printed("{'A': 'x', 'B': nan}") == {"A": "x", "B": None}
    assert printed("[{'role': 'user', 'content': 'Is it '\n  'red?'}]") == [{"role": "user", "content": "Is it red?"}]


def test_a_list_that_was_cut_is_refused_where_a_list_is_meant(tmp_path: Path) -> None:
    cut = "['a' 'b' ... 'y' 'z']"
    assert printed(cut) is None
    with pytest.raises(SampleError, match=r"'answers' holds a list that is neither JSON .* json\.dumps"):
        printed(cut, where="'answers'")
    for text in (cut, "[New York, new york city]", "[01, 02]"):
        with pytest.raises(SampleError, match="'answers' holds a list"):
            with_rows({"question": "Q?", "answers": text})
    (tmp_path / "a.csv").write_text(f"question,answers\nQ?,\"{cut}\"\nQ?,['a' 'b']\nQ?,[illegible]\n", encoding="utf-8")
    rows = CsvRows(tmp_path / "a.csv")
    assert len(list(rows.scan(None))) == 3
    with pytest.raises(SampleError, match="holds a list"):
        rows.read(0)
    assert [rows.read(index)["answers"] for index in (1, 2)] == [["a", "b"], "[illegible]"]


def test_options_that_numpy_printed_reach_the_prompt() -> None:
    question, answer = with_options({"choices": "['WW' 'MM' 'KK']"}, "Which?", "B", "B")
    assert question.startswith("Which?\nA. WW\nB. MM\nC. KK\n")
    assert answer == "B"
