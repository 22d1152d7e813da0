"""Searches for the times and tables of a solver: a score, and ways to find the schedule that has the least of it."""
