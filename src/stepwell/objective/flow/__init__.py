"""Objectives of flows: the forward path and Gaussian steps."""
