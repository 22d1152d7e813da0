"""Preferences: pairs, their scores, and the links from a margin to a loss."""
