"""Searches for the times and tables of a solver: scores, and ways to find the schedule with the least."""
