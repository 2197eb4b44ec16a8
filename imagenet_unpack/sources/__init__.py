"""Reads archives: which members they contain and where their bytes are."""
