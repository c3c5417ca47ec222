"""README's figures of speed and size, from the results of ``make bench``: its table, and what its prose quotes."""

import re
from dataclasses import dataclass
from pathlib import Path

from tests.benchmarks.bench_results import Results, numbers

README = Path(__file__).parents[2] / "README.md"
BEGIN, END = "<!-- bench -->\n", "<!-- /bench -->\n"


@dataclass(frozen=True)
class Quote:
    """A sentence's part in README that holds figures: ``{}`` for each name, in their order, as whole numbers."""

    text: str
    names: tuple[str, ...]

    def fill(self, results: Results) -> str:
        """The text as README must have it."""
        values = numbers(results)
        return self.text.format(*(f"{values[name]:,.0f}" for name in self.names))


QUOTES = (
    Quote("{} bytes a supervised token for the built-in teacher", ("stored bytes / row",)),
    Quote("A million records open in {} ms", ("open 1M records, 3,907 shards, ms",)),
    Quote("a sample is found in {} µs", ("find one of 1M samples, 10,000 times, us each",)),
    Quote("private memory grows by {} MB", ("private memory, 1M against 10k records, MB more",)),
    Quote(
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


def readme_table(results: Results) -> str:
    """The table of README: groups, medians, and the lowest and highest of what was repeated."""
    machine, values = results["machine"], numbers(results)
    lines = [
        f"| {machine['processor']}, {machine['cores']} cores, threads: {machine['threads']}; torch {machine['torch']} "
        "| median | lowest to highest |",
        "|---|---|---|",
    ]
    for title, names in results["groups"].items():
        lines.append(f"| **{title}** | | |")
        for name in names:
            ends = results["spreads"].get(name)
            spread = "" if ends is None else f"{short(ends[0])} to {short(ends[1])}"
            lines.append(f"| {name} | {short(values[name])} | {spread} |")
    return "\n".join(lines) + "\n"


def table_in(readme: str) -> str:
    """What stands between the two marks.

    Raises:
        ValueError: If a mark is missing.
    """
    if readme.count(BEGIN) != 1 or END not in readme.partition(BEGIN)[2]:
        raise ValueError(f"README.md has no block from {BEGIN.strip()} to {END.strip()}; put both lines back")
    return readme.partition(BEGIN)[2].partition(END)[0]


def rewrite(readme: str, before: Results | None, now: Results) -> str:
    """README with the table of new results, and with the quotes of the old ones brought up to date.

    Args:
        readme: Its text.
        before: The results that its prose was written from, if any.
        now: The new ones.
    """
    readme = readme.replace(f"{BEGIN}{table_in(readme)}{END}", f"{BEGIN}{readme_table(now)}{END}")
    if before is not None:
        for quote in QUOTES:
            readme = replace_words(readme, quote.fill(before), quote.fill(now))
    return readme


def replace_words(text: str, old: str, new: str) -> str:
    """Replace words wherever the lines of ``text`` break between them; ``old`` and ``new`` have equally many."""
    words = re.compile(r"(\s+)".join(map(re.escape, old.split(" "))))

    def fill(found: re.Match[str]) -> str:
        return "".join(word + gap for word, gap in zip(new.split(" "), [*found.groups(), ""], strict=True))

    return words.sub(fill, text)
