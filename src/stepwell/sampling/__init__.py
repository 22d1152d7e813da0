"""From requests to trajectories: one loop draws from every process."""
