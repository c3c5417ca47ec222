"""The shipped teacher of drawn scenes: weights, processor files, training.json. Holds no code."""
