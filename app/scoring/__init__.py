"""Calibration of scores, measures of accuracy, and shared array operations."""
