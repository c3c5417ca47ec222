"""Published benchmarks: their files as published, found by what they hold; the items that are scored."""
