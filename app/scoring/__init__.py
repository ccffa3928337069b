"""Calibration of scores, and measures of accuracy."""
