"""Why tests were skipped, a line a reason: what ``make test`` ends with."""

from collections import Counter
from collections.abc import Iterable
from typing import Any


def skip_lines(reports: Iterable[Any]) -> list[str]:
    """One line a reason, those of most tests first.

    Args:
        reports: Of pytest, of skipped tests and modules; their ``longrepr`` is ``(file, line, "Skipped: REASON")``.
    """
    said = (str(r.longrepr[-1] if isinstance(r.longrepr, tuple) else r.longrepr) for r in reports)
    reasons = Counter(" ".join(reason.removeprefix("Skipped: ").split()) for reason in said)
    return [
        f"skipped {count}: {reason}"
        for reason, count in sorted(reasons.items(), key=lambda entry: (-entry[1], entry[0]))
    ]
