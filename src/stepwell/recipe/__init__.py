"""A method as data, its card, and the place where it registers."""
