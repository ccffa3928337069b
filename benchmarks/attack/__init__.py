"""Attacks on a server, and what became of them."""
