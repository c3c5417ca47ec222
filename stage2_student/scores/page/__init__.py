"""Pages that are read offline: a run's, several runs' side by side, and the elements that they are made of."""
