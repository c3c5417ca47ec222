"""What a trained student leaves for others: its folder."""
