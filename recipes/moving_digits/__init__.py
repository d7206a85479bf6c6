"""The embedded default: a real, tiny Wan pipeline over moving handwritten digits."""
