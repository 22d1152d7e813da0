"""Exact answers that methods are held against."""
