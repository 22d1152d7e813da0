"""The methods: published compositions and their cards, and the registry that finds them and a user's own."""

from stepwell.methods.registry import Card, get, load_plugin, method, names

__all__ = ["Card", "get", "load_plugin", "method", "names"]
