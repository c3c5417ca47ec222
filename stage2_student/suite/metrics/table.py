"""All metrics by the name that benchmarks give them."""

from collections.abc import Mapping

from vlm_distill_cache.stage2_student.suite.metrics import captions, choices, short_answers, yes_no
from vlm_distill_cache.stage2_student.suite.requests import Metric

METRICS: Mapping[str, Metric] = {
    **captions.METRICS,
    **short_answers.METRICS,
    **choices.METRICS,
    **yes_no.METRICS,
}
