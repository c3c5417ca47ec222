"""YAML is what the library reads of it, but for keys that stand twice, of which it would drop the first."""

import json

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_distill_cache.common.files.yaml_text import YamlError, parse_yaml

SCALARS = st.none() | st.booleans() | st.integers() | st.text(st.characters(categories=["L", "Nd"]), max_size=4)
KEYS = st.text(st.characters(categories=["Ll"]), min_size=1, max_size=3)
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3))


@given(VALUES, st.sampled_from([True, False, None]))
@settings(max_examples=100, deadline=None)
def test_what_has_each_key_once_is_read_as_by_the_library(value, flow):
    text = yaml.safe_dump(value, default_flow_style=flow, allow_unicode=True)
    assert parse_yaml(text) == yaml.safe_load(text) == value


@given(st.dictionaries(KEYS, SCALARS, min_size=1, max_size=4), st.data())
@settings(max_examples=60, deadline=None)
def test_a_key_twice_is_refused_with_both_lines_at_any_depth(entry, data):
    repeated = data.draw(st.sampled_from(sorted(entry)))
    lines = [yaml.safe_dump({key: value}, allow_unicode=True).strip() for key, value in entry.items()]
    lines.append(yaml.safe_dump({repeated: 1}).strip())
    first = sorted(entry, key=list(entry).index).index(repeated) + 1
    nested = "- - x:\n" + "".join(f"      {line}\n" for line in lines)
    message = rf"line {len(lines) + 1}, column 7: .* stands twice, first in line {first + 1}; write it once"
    with pytest.raises(YamlError, match=message) as caught:
        parse_yaml(nested)
    assert "\n" not in str(caught.value)


def test_what_is_merged_in_may_be_overruled():
    text = "c: &c {<<: &b {<<: &a {x: 1, y: 1}, x: 2}, y: 3}\nd: {<<: [*b, *a], z: 4}\ne: {<<: *c, x: 5}\n"
    assert parse_yaml(text) == yaml.safe_load(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- data: a\n images: b\n", r"line 2, column 2: .*expected"),
        ("a: [1", "line 1, column 6: .*expected"),
        ("\ta: 1", r"line 1, column 1: .*'\\t'"),
        ("a: \x01", "special characters are not allowed"),
        ("a: 2024-13-45", r"line 1, column 4: a value of the kind 'timestamp'.*put texts in quotes"),
        ("{a: 1}\n---\n{b: 1}", "line 2, column 1: expected a single document"),
        ("!!python/object/apply:os.system ['true']", "a value of the kind 'python/object/apply"),
        ("[" * 5000, "nested too deeply"),
        ("? [a, b]\n: 1\n? {c: d}\n: 2\n", "unhashable"),
    ],
)
def test_faults_are_one_line(text, message):
    with pytest.raises(YamlError, match=message) as caught:
        parse_yaml(text)
    assert "\n" not in str(caught.value)


KINDS = ["null", "bool", "int", "float", "str", "seq", "map", "merge", "value", "timestamp", "binary", "set", "omap", "pairs",
         "python/none", "python/name:os.system", "python/tuple", "x"]  # fmt: skip


@pytest.mark.parametrize(
    "value", ["", "''", "maybe", "x", "0x", "0b", "1:", ".", "-", "[a]", "{a: b}", "2020-01-01", "="]
)
@pytest.mark.parametrize("kind", [*(f"!!{kind} " for kind in KINDS), "!own ", "! ", ""])
def test_any_tag_on_any_value_gives_what_json_has_or_one_line(kind, value):
    for text in (f"a: {kind}{value}\n", f"? {kind}{value}\n: b\n"):
        said = ""
        try:
            json.dumps(parse_yaml(text))
        except YamlError as error:
            said = str(error)
        assert "\n" not in said
