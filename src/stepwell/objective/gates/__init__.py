"""Which steps train: gates of a step, of a minibatch, and of whole rows."""
