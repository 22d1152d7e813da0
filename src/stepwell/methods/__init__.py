"""The methods: published compositions with their cards, and the catalogue of them and of a user's own."""

from stepwell.methods.catalogue import get, names
from stepwell.recipe.card import Card
from stepwell.recipe.plugins import load_plugin
from stepwell.recipe.registry import forget, method

__all__ = ["Card", "forget", "get", "load_plugin", "method", "names"]
