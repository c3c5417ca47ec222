"""Questions and statements answered by yes or no: POPE, MME, HallusionBench, NLVR; LLaVA's question files."""

from vlm_distill_cache.data.benchmarks.layouts import Layout

LAYOUTS: tuple[Layout, ...] = ()
