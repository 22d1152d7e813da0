"""What methods are compared on: a start, prompts, rewards and a held-out measure."""
