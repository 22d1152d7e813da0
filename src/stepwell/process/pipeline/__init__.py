"""Pipelines of `diffusers` as flows in their latents."""
