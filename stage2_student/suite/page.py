"""The page of a suite's scores."""

import html
from pathlib import Path

from vlm_distill_cache.common.files.atomic import read_json, write_bytes_atomic
from vlm_distill_cache.stage2_student.suite.table import render_suite

PAGE = "report.html"


def write_suite_page(output: Path) -> Path:
    """Write the page of ``OUTPUT/summary.json`` beside it, and return where."""
    summary = read_json(output / "summary.json")
    title = html.escape(f"{summary['student']['name']} on published benchmarks")
    body = f"<h1>{title}</h1><pre>{html.escape(render_suite(summary))}</pre>"
    page = f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{title}</title><body>{body}</body></html>\n"
    write_bytes_atomic(output / PAGE, page.encode())
    return output / PAGE
