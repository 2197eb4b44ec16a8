"""Whether a tree is whole, against its manifest and the published facts; shares no code with what writes it."""
