"""Data set and cache joined: sample, decoded signals, common grid, batch, order, prefetch."""
