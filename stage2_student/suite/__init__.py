"""Published benchmarks asked of a model: requests, metrics, the run over a folder of them, its table and page."""
