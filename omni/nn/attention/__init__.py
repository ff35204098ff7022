"""Attention: backends without a tangent, and attention with one (jvp)."""
