"""Held-out items, metrics, pictures, the report; what a student's card says of it, and its copy on a hub."""
