"""A method as data, its card, and where it is found."""
