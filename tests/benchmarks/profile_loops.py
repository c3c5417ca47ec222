"""Where both loops spend their time: ``make profile``.

Stage one builds the demonstration's teacher cache, stage two trains a student from it with logits and answer attention. Each runs
under py-spy, which looks at all its threads a hundred times a second, from outside. The flame graphs are stored beside the
results, and docs/results.md shows what was on top of the stacks most often once everything was imported.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.benchmarks.bench_docs import table_in
from tests.benchmarks.bench_results import describe_machine, rounded

STORED = Path(__file__).parent / "results" / "profile.json"
BEGIN, END = "<!-- profile -->\n", "<!-- /profile -->\n"
LOOPS = {"stage-one": "stage one", "stage-two": "stage two"}
SHOWN = 12  # functions of each
SETTINGS = (
    "phases=dft",
    "dft.batch_size=16",
    "dft.losses.lm=1",
    "dft.losses.logits=1",
    "dft.losses.answer_attention=1",
)

_LINE = re.compile(r":\d+\)$")

Stacks = Counter[tuple[str, ...]]
"""How often each stack was seen, its outermost function first."""


def graph_of(loop: str) -> Path:
    """The stored flame graph of a loop."""
    return STORED.with_name(f"profile-{loop}.svg")


def command_of(loop: str, folder: Path, samples: int, form: str) -> list[str]:
    """What is looked at, for each form of output anew; stage two reads the cache that stage one has made in the folder."""
    programs, cache = Path(sys.executable).parent, str(folder / "cache")
    if loop == "stage-one":
        options = ["--data", "shapes", "--limit", str(samples), "--set", "fidelity_samples=0", "--overwrite"]
        return [str(programs / "teacher-cache"), "build", "--cache", cache, *options]
    sets = [word for one in (*SETTINGS, f"dft.steps={samples // 16}") for word in ("--set", one)]
    return [str(programs / "distill"), "train", "--cache", cache, "--output", f"{folder}/{form}", *sets]


def read_stacks(text: str) -> Stacks:
    """Read what py-spy writes as ``raw``: ``a (a.py:1);b (b.py:7) 12``.

    Imports are left out, threads without Python, and numbers of lines.
    """
    stacks: Stacks = Counter()
    for line in text.splitlines():
        stack, _, looks = line.rpartition(" ")
        if stack.strip() and "_find_and_load (" not in stack:
            stacks[tuple(_LINE.sub(")", frame) for frame in stack.split(";"))] += int(looks)
    return stacks


def on_top(stacks: Stacks) -> dict[str, float]:
    """Percent of all looks by the function on top, the most frequent first."""
    tops: Counter[str] = Counter()
    for stack, looks in stacks.items():
        tops[stack[-1]] += looks
    return {name: 100 * looks / tops.total() for name, looks in tops.most_common()}


def entitled(graph: str, title: str) -> str:
    """A flame graph with a title in place of the command that py-spy writes there, which names folders of this machine."""
    return re.sub(r'(<text id="title"[^>]*>)[^<]*', rf"\g<1>{title}", graph, count=1)


def table(stored: Mapping[str, Any]) -> str:
    """The functions of both loops side by side, as Markdown; empty without results."""
    if not stored:
        return ""
    machine = stored["machine"]
    columns = [[f"{share:.1f} % `{name}`" for name, share in stored["on_top"][loop].items()] for loop in LOOPS]
    lines = [f"| {machine['processor']}, {machine['cores']} cores: {' | '.join(LOOPS.values())} |", "|---|---|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in zip(*columns, strict=False)), ""])


def look_at(spy: str, command: list[str], output: Path, form: str) -> None:
    """Run a command under py-spy."""
    options = ["--rate", "100", "--function", "--format", form, "--output", output]
    subprocess.run([spy, "record", *options, "--", *command], check=True)


def main() -> None:
    """Look at both loops, store their graphs and write the page's table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--spy", default="py-spy", help="The program.")
    parser.add_argument("--samples", type=int, default=1500)
    options = parser.parse_args()
    stored: dict[str, Any] = {"machine": describe_machine(), "samples": options.samples, "on_top": {}}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for loop in LOOPS:
            for form, output in (("flamegraph", graph_of(loop)), ("raw", folder / "stacks")):
                look_at(options.spy, command_of(loop, folder, options.samples, form), output, form)
            graph_of(loop).write_text(entitled(graph_of(loop).read_text(), LOOPS[loop]))
            tops = on_top(read_stacks((folder / "stacks").read_text()))
            stored["on_top"][loop] = {name: rounded(tops[name]) for name in [*tops][:SHOWN]}
    STORED.write_text(json.dumps(stored, indent=1) + "\n")
    page = Path("docs/results.md")
    text = page.read_text()
    page.write_text(text.replace(BEGIN + table_in(text, BEGIN, END) + END, BEGIN + table(stored) + END))
    sys.stdout.write(table(stored))


if __name__ == "__main__":
    main()
