"""Workers that an engine places and starts (Ray, SLURM); no scheduling is our own."""
