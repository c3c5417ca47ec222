"""The documentation's figures of speed and size, from the results of ``make bench``: a table, and what prose quotes."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.benchmarks.bench_results import Results, numbers

ROOT = Path(__file__).parents[2]
TABLE_PAGE = "docs/results.md"
CODEC_DISTRIBUTIONS = (
    "synthetic sharp, vocabulary 32,000",
    "synthetic flat, vocabulary 32,000",
    "SmolLM2-135M, prose",
)
CODEC_FORMATS = {  # of the stored results, as the page calls them
    **{name: f"`{name}`" for name in ("lean", "default", "wide", "full", "fixed:128")},
    "DistillKit recommended, symmetric_uniform": "DistillKit, `symmetric_uniform`",
    "DistillKit recommended with normalize_t, symmetric_uniform": "the same with `normalize_t`",
    "DistillKit recommended with normalize_t, zero": "DistillKit with `normalize_t`, `zero`",
    "Megatron-style top 32, ghost token": "Megatron-style top 32",
    "float16 + int32 top 64, renormalised": "float16 + int32 top 64, renormalised",
}
BEGIN, END = "<!-- bench -->\n", "<!-- /bench -->\n"


@dataclass(frozen=True)
class Quote:
    """A sentence's part that holds figures: ``{}`` for each name, in their order, as whole numbers."""

    page: str
    text: str
    names: tuple[str, ...]

    def fill(self, results: Results) -> str:
        """The text as its page must have it."""
        values = numbers(results)
        return self.text.format(*(f"{values[name]:,.0f}" for name in self.names))


QUOTES = (
    Quote("README.md", "{} bytes per supervised token with the built-in teacher", ("stored bytes / row",)),
    Quote("docs/scale.md", "{} bytes per supervised token with the built-in teacher", ("stored bytes / row",)),
    Quote("docs/scale.md", "A million records open in {} ms", ("open 1M records, 3,907 shards, ms",)),
    Quote("docs/scale.md", "a sample is found in {} µs", ("find one of 1M samples, 10,000 times, us each",)),
    Quote("docs/scale.md", "private memory grows by {} MB", ("private memory, 1M against 10k records, MB more",)),
    Quote(
        "docs/scale.md",
        "shuffled reading is {} (Zarr) and {} (tar) times zarr-python's reads per record",
        (
            "zarr, block-shuffled / zarr-python, per record",
            "tar, block-shuffled / zarr-python, per record",
        ),
    ),
)


def short(value: float) -> str:
    """Three digits, thousands whole."""
    kept = float(f"{value:.3g}") if abs(value) < 1000 else value
    return f"{kept:,.0f}" if abs(kept) >= 1000 else f"{kept:g}"


def bench_table(results: Results) -> str:
    """The table: groups, medians, the lowest and highest of what was repeated, and ratios of processor time."""
    machine, values = results["machine"], numbers(results)
    lines = [
        f"| {machine['processor']}, {machine['cores']} cores, threads: {machine['threads']}; torch {machine['torch']} "
        "| median | lowest to highest | of processor time |",
        "|---|---|---|---|",
    ]
    for title, names in results["groups"].items():
        lines.append(f"| **{title}** | | | |")
        for name in names:
            ends = results["spreads"].get(name)
            spread = "" if ends is None else f"{short(ends[0])} to {short(ends[1])}"
            cpu = results.get("cpu", {}).get(name)
            robust = "" if cpu is None else f"{short(cpu[0])} ({short(cpu[1])} to {short(cpu[2])})"
            lines.append(f"| {name} | {short(values[name])} | {spread} | {robust} |")
    return "\n".join(lines) + "\n"


def codec_rows(figures: Mapping[str, Any]) -> list[str]:
    """Rows of the logit formats: bytes a row, gradient error for the noisy and for the flatter student.

    Args:
        figures: Of ``make bench-codec``, as stored.
    """
    rows = []
    for format_name, shown in CODEC_FORMATS.items():
        cells = []
        for distribution in CODEC_DISTRIBUTIONS:
            found = figures["logits"][distribution][format_name]
            cells.append("{bytes:.0f}, {gradient_error:.4f} / {gradient_error_flatter:.4f}".format(**found))
        rows.append(f"| {shown} | " + " | ".join(cells) + " |")
    return rows


def map_table(figures: Mapping[str, Any]) -> str:
    """The table of the visual map's presets: kB a sample, and the gradient's cosine, mean (worst)."""
    lines = ["| preset | kB a sample | cosine, early student | cosine, late student |", "|---|---|---|---|"]
    maps = figures["attention"]["SmolLM2 VLM, 576 tokens"]["visual_map"]
    for name in ("exact", "blocks", "compact", "exact8", "f4"):
        cosines = [maps[name][f"sink_filtered, {when} student"] for when in ("early", "late")]
        cells = " | ".join("{mean:.4f} ({worst:.4f})".format(**cosine) for cosine in cosines)
        lines.append(f"| `{name}` | {maps[name]['kb_per_sample']:,.0f} | {cells} |")
    return "\n".join(lines) + "\n"


def table_in(text: str, begin: str = BEGIN, end: str = END) -> str:
    """What stands between two marks.

    Raises:
        ValueError: If a mark is missing.
    """
    if text.count(begin) != 1 or end not in text.partition(begin)[2]:
        raise ValueError(f"{TABLE_PAGE} has no block from {begin.strip()} to {end.strip()}; put both lines back")
    return text.partition(begin)[2].partition(end)[0]


def rewrite(text: str, page: str, before: Results | None, now: Results) -> str:
    """A page with the table of new results, and with the quotes of the old ones brought up to date.

    Args:
        text: The page's.
        page: Its path, as in `QUOTES`; the table is in `TABLE_PAGE`.
        before: The results that its prose was written from, if any.
        now: The new ones.
    """
    if page == TABLE_PAGE:
        text = text.replace(f"{BEGIN}{table_in(text)}{END}", f"{BEGIN}{bench_table(now)}{END}")
    for quote in QUOTES:
        if before is not None and quote.page == page:
            text = replace_words(text, quote.fill(before), quote.fill(now))
    return text


def rewrite_pages(before: Results | None, now: Results) -> None:
    """Rewrite every page that shows results of the bench."""
    for page in dict.fromkeys((TABLE_PAGE, *(quote.page for quote in QUOTES))):
        path = ROOT / page
        path.write_text(rewrite(path.read_text(), page, before, now))


def replace_words(text: str, old: str, new: str) -> str:
    """Replace words wherever the lines of ``text`` break between them; ``old`` and ``new`` have equally many."""
    words = re.compile(r"(\s+)".join(map(re.escape, old.split(" "))))

    def fill(found: re.Match[str]) -> str:
        return "".join(word + gap for word, gap in zip(new.split(" "), [*found.groups(), ""], strict=True))

    return words.sub(fill, text)
