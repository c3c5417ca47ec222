"""What a trained student is saved as."""
