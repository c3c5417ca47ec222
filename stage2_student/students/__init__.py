"""The model that is trained: built, loaded, described."""
