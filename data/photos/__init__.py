"""Photographs of things, put together to pictures: ``photo-scenes``."""
