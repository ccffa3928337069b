"""Vocabulary-free classification: a database of captions, and words mined from those near an image."""
