"""The report: one self-contained page that shows what is in a target."""
