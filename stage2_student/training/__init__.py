"""The state of a run: checks, preparation, steps, checkpoint, log, output folder."""
