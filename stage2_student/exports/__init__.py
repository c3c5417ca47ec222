"""What a trained student becomes: its card, and its copy on a hub."""
