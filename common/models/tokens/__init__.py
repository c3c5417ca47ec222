"""Students that feed, or look at, fewer visual tokens."""
