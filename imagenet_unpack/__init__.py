"""Unpack the ImageNet-1K archives into class folders: concurrently, checked, and published only when whole."""

__version__ = "0.1.0"
