"""Held-out items, metrics, pictures, the report."""
