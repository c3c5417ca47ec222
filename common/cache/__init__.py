"""What a cache is: the record, the four documents (plan, sidecar, manifest, index) and the reader.

No torch, no network.
"""
