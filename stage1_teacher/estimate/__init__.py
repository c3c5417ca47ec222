"""Bytes, hours and cost before anything is built."""
