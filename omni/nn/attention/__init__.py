"""Attention: backends, and attention with its forward-mode tangent (jvp)."""
