"""Questions with options: MMBench, MMStar, SEED-Bench, AI2D, ScienceQA."""

from vlm_distill_cache.data.benchmarks.layouts import Layout

LAYOUTS: tuple[Layout, ...] = ()
