"""Caches of teachers that ran elsewhere: from log-probabilities that a server or another tool wrote."""
