"""Stepwell: sample, steer and train anything that makes its sample one random step at a time."""
