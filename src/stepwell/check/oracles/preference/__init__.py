"""Oracles of preferences."""
