"""Oracles of credit: critics, columns, entropy, risk and rollouts."""
