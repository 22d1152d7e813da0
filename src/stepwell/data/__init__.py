"""What people bring: prompts, and the endless stream that planners take from."""
