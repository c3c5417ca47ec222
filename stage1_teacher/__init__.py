"""Stage one: run the teacher once and write the cache."""
