"""What a trained student leaves for others: its folder, other layouts of it, its card, its copy on a hub."""
