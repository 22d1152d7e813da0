"""Solvers of flows and diffusions: path, grid and table of a step, over one exponential integrator."""
