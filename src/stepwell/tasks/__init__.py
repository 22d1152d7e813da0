"""Tasks to compare methods on: a start, prompts, rewards and held-out prompts."""
