"""Asking a large language model how classes look, and making descriptions of its answers."""
