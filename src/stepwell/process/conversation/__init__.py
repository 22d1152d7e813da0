"""A language model in conversation with an environment: tools, games, users; only its own words are trained."""
