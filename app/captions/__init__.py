"""Vocabulary-free classification: caption databases, and labels from the captions near an image."""
