"""What a trained student leaves for others: its folder, and other layouts of it."""
