"""Speculative decoding of a language model by its joint-token heads, against other decoding, on held-out text."""
