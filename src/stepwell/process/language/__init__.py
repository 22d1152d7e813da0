"""Causal language models of `transformers`: a step is a token."""
