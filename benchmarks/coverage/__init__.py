"""Coverage benchmark: what a new user's first edit does to a zoo of architectures."""
