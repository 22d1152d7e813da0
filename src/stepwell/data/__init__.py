"""Data that users bring: prompts with their columns, and the endless stream that planners take from."""
