"""Models in service: one queue for each tower, and health probes."""
