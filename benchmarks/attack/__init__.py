"""Attacks on a server, and their results."""
