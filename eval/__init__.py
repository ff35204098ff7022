"""Evaluation: python -m eval SUITE.toml [key=value ...] [--json FILE] [--html FILE]. See suite.py."""
