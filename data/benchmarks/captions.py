"""What compositional benchmarks show: pictures with captions that fit and captions that do not."""

from vlm_distill_cache.data.benchmarks.layouts import Layout

LAYOUTS: tuple[Layout, ...] = ()
