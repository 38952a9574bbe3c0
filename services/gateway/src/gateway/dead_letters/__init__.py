"""Dead letters: messages that could not be run, kept as they were until a person has seen to them."""
