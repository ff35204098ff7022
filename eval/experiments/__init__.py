"""Experiments: small networks trained and measured separately, each with its tasks."""
