"""The laws that every process obeys."""
