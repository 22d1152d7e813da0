"""Better samples without training: what moves or weighs samples while they are drawn."""
