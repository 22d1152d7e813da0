"""Flows and diffusions: a step is a denoising step."""

from stepwell.process.kinds import register

register("flow", "flows")
