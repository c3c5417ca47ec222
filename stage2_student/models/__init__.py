"""Student models."""
