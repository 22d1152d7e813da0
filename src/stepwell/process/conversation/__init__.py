"""A language model in conversation with an environment: tools, games, users; only its own words are trained."""

from stepwell.process.conversation.environment import Environment, environment_return
from stepwell.process.conversation.process import Turns

__all__ = ["Environment", "Turns", "environment_return"]
