"""The documentation: short where it must be, no dead link, no command that does not exist, no stale generated page."""

import dataclasses
import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from test_architecture import ORDER, PACKAGES
from test_command_line import GROUPS, SURFACE, TARGETS

import vlm_distill_cache

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
README_BYTES, README_ROWS = 9000, 8
DEMONSTRATION = ROOT / "tests" / "benchmarks" / "results" / "demonstration.json"

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def load_generator():
    spec = importlib.util.spec_from_file_location("docs_generate", ROOT / "docs" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def prose_of(text: str) -> str:
    """A page without its code."""
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))


def code_of(text: str) -> list[str]:
    """The blocks and spans of code of a page."""
    blocks = re.findall(r"^```.*?^```", text, flags=re.M | re.S)
    return blocks + re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))


def anchors_of(page: Path) -> set[str]:
    """The anchors that a page's headings get on a code host."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_readme_is_one_page():
    assert len((ROOT / "README.md").read_bytes()) <= README_BYTES
    tables = re.findall(r"(?:^\|.*\n)+", (ROOT / "README.md").read_text(), flags=re.M)
    assert tables
    assert max(len(table.splitlines()) - 2 for table in tables) <= README_ROWS  # without heading and rule


def test_the_readme_shows_the_test_command_and_the_demonstration():
    blocks = "\n".join(re.findall(r"^```\n.*?^```", (ROOT / "README.md").read_text(), flags=re.M | re.S))
    assert "\nmake test " in blocks
    assert "\nmake distill STUDENT=mobilevlm " in blocks


@every_page
def test_every_relative_link_leads_somewhere(page: Path):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose_of(page.read_text())):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), f"{page.name}: {target}"
        assert found.is_relative_to(ROOT), f"{page.name}: {target}"
        if anchor and found.suffix == ".md":
            assert anchor in anchors_of(found), f"{page.name}: {target}"


@every_page
def test_every_command_named_in_it_exists(page: Path):
    for code in code_of(page.read_text()):
        assert set(re.findall(r"\bmake ([a-z][a-z-]*)", code)) <= TARGETS, code
        for program in GROUPS:
            words = re.findall(rf"(?<![\w/-]){program} ([a-z][a-z-]*)", code.replace(".venv/bin/", ""))
            if f"make {program}" not in code:
                assert {f"{program} {word}" for word in words} <= set(SURFACE), code


@every_page
def test_every_file_and_name_of_ours_in_it_exists(page: Path):
    for code in code_of(page.read_text()):
        for module in re.findall(r"python -m (tests\.[\w.]+)", code):
            assert (ROOT / f"{module.replace('.', '/')}.py").is_file(), code
        for path in re.findall(r"\b((?:tests|docs)/[\w./-]*\w)", code):
            assert (ROOT / path).exists(), code
        assert set(re.findall(r"\bvdc\.(\w+)", code)) <= set(vlm_distill_cache.__all__), code


def test_the_code_cites_pages_of_this_repository_only():
    sources = [path for name in PACKAGES for kind in ("*.py", "*.yaml") for path in (ROOT / name).rglob(kind)]
    cited = {(path, page) for path in sources for page in re.findall(r"[\w/-]+\.md\b", path.read_text())}
    lost = {(str(path), page) for path, page in cited if page != "README.md" and not (ROOT / page).is_file()}
    assert lost == set()  # README.md is a cache's card
    assert len(cited) > 10


def test_the_picture_of_the_layout_shows_the_order_that_is_enforced():
    picture = re.search(r"^```\n(common/.*?)^```", (ROOT / "CONTRIBUTING.md").read_text(), flags=re.M | re.S)[1]
    blocks = [block.splitlines() for block in picture.split("\n\n")]
    shown = {
        first.partition("/")[0]: [re.split(r"\s{2,}", line.strip())[0] for line in lines] for first, *lines in blocks
    }
    assert shown == {package: list(levels) for package, levels in ORDER.items()}


def test_the_generated_pages_are_what_the_code_says():
    for name, page in load_generator().PAGES.items():
        assert (ROOT / "docs" / name).read_text() == page(), f"docs/{name} is stale: run `make docs`"


def test_the_generated_pages_do_not_depend_on_the_terminal():
    code = (
        "import importlib.util as u; s = u.spec_from_file_location('g', 'docs/generate.py'); "
        "m = u.module_from_spec(s); s.loader.exec_module(m); print(m.commands_page(), end='')"
    )
    narrow = {**os.environ, "COLUMNS": "40", "FORCE_COLOR": "1", "TERM": "xterm-256color", "PYTHONIOENCODING": "utf-8"}
    shown = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=narrow, capture_output=True, text=True, check=True
    )
    assert shown.stdout == (ROOT / "docs" / "commands.md").read_text()


def test_every_command_and_option_is_on_the_generated_pages():
    commands, options = ((ROOT / "docs" / name).read_text() for name in ("commands.md", "options.md"))
    for command, words in SURFACE.items():
        section = commands.partition(f"\n### {command}\n")[2].partition("\n### ")[0]
        assert section, command
        assert all(word in section for word in words.split() if word.startswith("--")), command
    for cls, prefix, _ in load_generator().CONFIGS:
        assert all(f"| `{prefix}{field.name}` |" in options for field in dataclasses.fields(cls)), cls


def shown(score: dict | None, *, sign: str = "") -> str:
    """A share as percent with its interval, as tables print it."""
    if score is None:
        return "-"
    value, low, high = (f"{100 * score[end]:{sign}.1f}" for end in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def test_the_figures_of_the_demonstration_are_the_stored_ones():
    stored = json.loads(DEMONSTRATION.read_text())
    rows = {}
    for name, gain in stored["gain"].items():
        found = [stored["scores"][model].get(name) for model in ("sft", "distilled", "teacher")]
        rows[name] = [shown(score) for score in found] + [shown(gain, sign="+")]
    assert [cell.partition(" ")[0] for cell in rows["likelihood"]] == ["55.3", "72.7", "95.2", "+17.4"]
    readme = " ".join((ROOT / "README.md").read_text().split())
    results = (ROOT / "docs" / "results.md").read_text()
    for row in rows.values():
        assert " ".join(row) in readme
        assert " | ".join(row) in results
    teacher = json.loads((ROOT / "stage1_teacher" / "builtin" / "training.json").read_text())
    assert rows["likelihood"][2].startswith(f"{teacher['accuracy']['mean']['pairs']} ")


def test_the_citation_names_this_version_and_the_paper():
    import yaml

    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= set(cited)
    sources = "".join((ROOT / name).read_text() for name in ("pyproject.toml", "src/vlm_distill_cache/__init__.py"))
    version = re.search(r'^(?:__version__|version) = "(.*)"$', sources, flags=re.M)[1]
    assert cited["version"] == version
    assert "2510.12184" in str(cited["references"])
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text()
