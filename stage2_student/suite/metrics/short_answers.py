"""How these are counted, as published: the metrics of `data.benchmarks.short_answers`."""

from collections.abc import Mapping

from vlm_distill_cache.stage2_student.suite.requests import Metric

METRICS: Mapping[str, Metric] = {}
