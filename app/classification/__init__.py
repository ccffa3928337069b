"""From a request to predictions."""
