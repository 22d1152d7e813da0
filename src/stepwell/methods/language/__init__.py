"""Methods for processes that draw tokens."""
