"""Stage two: train students from a cache, without the teacher."""
