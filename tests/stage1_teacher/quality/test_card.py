"""The card: what the Hub reads at its top, licences, sizes; equal for both stores but for one line."""

from pathlib import Path

import pytest
import yaml

from vlm_distill_cache.common.cache.plan import read_plan
from vlm_distill_cache.common.errors import ConfigError
from vlm_distill_cache.common.opening import open_cache
from vlm_distill_cache.common.tools.shift import cache_shift
from vlm_distill_cache.common.tools.shift_view import shift_section
from vlm_distill_cache.data.questions import AskedData
from vlm_distill_cache.data.registry import open_dataset
from vlm_distill_cache.stage1_teacher.config import BuildConfig


def front_matter(card: str) -> dict:
    _, text, _ = card.split("---\n", 2)
    return yaml.safe_load(text)


def test_licences_and_source_are_in_the_card_and_its_front_matter(tmp_path: Path, build_cache):
    build_cache(
        tmp_path / "cache", license="cc-by-4.0", teacher_license="Llama 2 | community", data_license="CC BY 4.0",
        source="https://example.org, 'us'",
    )  # fmt: skip
    card = (tmp_path / "cache" / "README.md").read_text()
    entries = front_matter(card)
    assert entries["license"] == "cc-by-4.0"
    assert entries["size_categories"] == ["n<1K"]
    assert "teacher-cache" in entries["tags"]
    assert entries["viewer"] is False
    assert "| the teacher | Llama 2 \\| community |" in card
    assert "| the data | CC BY 4.0 |" in card
    assert "Source or contact: `https://example.org, 'us'`." in card
    plan = read_plan(tmp_path / "cache")
    assert plan.data["cache_license"] == "cc-by-4.0"
    assert plan.teacher["license"] == "Llama 2 | community"


def test_what_nobody_stated_is_said_to_be_unknown(tmp_path: Path, build_cache):
    build_cache(tmp_path / "cache")
    card = (tmp_path / "cache" / "README.md").read_text()
    assert front_matter(card)["license"] == "unknown"
    assert card.count("| not stated |") == 3
    assert "license" not in read_plan(tmp_path / "cache").data


def test_a_licence_given_on_resume_is_no_other_option_but_not_recorded_either(tmp_path: Path, build_cache, caplog):
    build_cache(tmp_path / "cache", license="mit")
    before = (tmp_path / "cache" / "README.md").read_bytes()
    assert build_cache(tmp_path / "cache", license="apache-2.0").built == 0
    assert "'apache-2.0' is not recorded" in caplog.text
    assert (tmp_path / "cache" / "README.md").read_bytes() == before


def test_sizes_are_those_of_the_records_and_equal_for_both_stores(tmp_path: Path, build_cache):
    cards = {}
    for store in ("zarr", "webdataset"):
        build_cache(tmp_path / store, store=store)
        cards[store] = (tmp_path / store / "README.md").read_text()
    assert cards["zarr"].replace("Store: zarr", "Store: webdataset") == cards["webdataset"]
    cache = open_cache(tmp_path / "zarr")
    names = [field.name for field in cache.plan.fields["answer_attention"]]
    records = [cache.read(sample_id) for sample_id in cache.sample_ids]
    size = sum(record[name].nbytes for record in records for name in names)
    rows = sum(len(record["labels"]) for record in records)
    assert f"| `answer_attention` | {size / rows:.1f} | {size / len(records):.0f} |" in cards["zarr"]
    assert f"- Size: {len(records)} records, {rows} supervised rows; 0 samples could not be used" in cards["zarr"]


def test_a_licence_of_several_lines_is_refused():
    with pytest.raises(ConfigError, match="license: expected one line"):
        BuildConfig(license="mit\nviewer: true")


def test_whatever_an_author_states_is_text_in_the_card(tmp_path: Path, build_cache):
    said = "[a](http://e) ![b](http://e/c.png) <img src=http://e> `d` | *f* &lt; $g$"
    build_cache(tmp_path / "cache", license=said, teacher_license=said, data_license=said, source=said)
    card = (tmp_path / "cache" / "README.md").read_text()
    assert front_matter(card)["license"] == said
    parser = pytest.importorskip("markdown_it").MarkdownIt("commonmark").enable("table")
    tokens = parser.parse(card.split("---\n", 2)[2])
    inline = [token for token in tokens if token.type == "inline"]
    kinds = {token.type for token in tokens} | {child.type for token in inline for child in token.children}
    assert not {kind for kind in kinds if kind.startswith(("link", "image", "html", "em_"))}
    shown = said.replace("`", "'")  # as code, since it holds what would become a link by itself
    assert sum("".join(child.content for child in token.children) == shown for token in inline) == 3  # whole cells


def test_it_tells_how_the_gaze_shifts_by_kind_of_question_and_says_nothing_without_it(tmp_path: Path, build_cache):
    build_cache(tmp_path / "cache")
    cache = open_cache(tmp_path / "cache")
    card = (tmp_path / "cache" / "README.md").read_text()
    data = AskedData(open_dataset("shapes"))
    found = cache_shift(cache, asked=data.questions)
    assert found.asked
    assert shift_section(found) in card
    assert "| no question (a caption) | " in card
    build_cache(tmp_path / "without", signals=("logits",))
    assert "Shift of the gaze" not in (tmp_path / "without" / "README.md").read_text()
