"""Published facts, label files, and synthetic archives of the same shape."""
