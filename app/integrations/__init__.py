"""Deixis inside other programs: Label Studio, which asks it for predictions, and FiftyOne, whose datasets it labels.

They ask a running service through the client, as any program can.
"""
