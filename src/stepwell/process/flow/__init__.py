"""Flows and diffusions: a step is a denoising step."""
