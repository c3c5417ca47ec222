"""The verbs of cachectl, one file each."""
