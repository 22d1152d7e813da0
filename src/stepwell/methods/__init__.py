"""The methods: published compositions and their cards, and where they and a user's own are found."""

from stepwell.methods.catalogue import get, names
from stepwell.recipe.card import Card
from stepwell.recipe.plugins import load_plugin
from stepwell.recipe.registry import forget, method

__all__ = ["Card", "forget", "get", "load_plugin", "method", "names"]
