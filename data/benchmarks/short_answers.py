"""Questions answered in a few words: VQAv2, OK-VQA, TextVQA, VizWiz, GQA, DocVQA, ChartQA."""

from vlm_distill_cache.data.benchmarks.layouts import Layout

LAYOUTS: tuple[Layout, ...] = ()
