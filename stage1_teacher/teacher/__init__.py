"""A loaded teacher: one batch in, wanted rows out; what it hands on."""
