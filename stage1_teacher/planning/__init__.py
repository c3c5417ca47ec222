"""Before the loop: what is run, what the cache will hold, who takes which shard."""
