"""What both stages must agree on: cache format, codecs, geometry, attention capture."""
