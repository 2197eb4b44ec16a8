"""Checks whether a tree or an image is whole; shares no code with what writes it."""
