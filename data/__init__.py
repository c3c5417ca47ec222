"""Samples in, tensors out: readers, prompt templates, encoding, collation."""
