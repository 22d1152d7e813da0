"""Causal language models of `transformers`: a step is a token."""

from stepwell.process.kinds import register

register("language", "language models")
