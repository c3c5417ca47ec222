"""Bytes on disk: whole or absent, hashed, and what a full disk means."""
