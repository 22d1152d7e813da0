"""Oracles of flows' methods."""
