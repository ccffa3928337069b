"""Endpoint functions, one file per resource."""
