"""Trained students in the layouts of other programs."""
