"""Oracles of ratios, clips and gates."""
