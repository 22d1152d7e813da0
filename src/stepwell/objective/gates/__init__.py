"""Gates, which say what trains: of single steps, of a minibatch, and of whole rows."""
