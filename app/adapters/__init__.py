"""Training-free classifiers over frozen features, one published method per file."""
