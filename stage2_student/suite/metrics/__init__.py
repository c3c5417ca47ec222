"""Published metrics: pure functions of items and results. No model, no file, no torch."""
