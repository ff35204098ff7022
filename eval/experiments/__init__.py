"""Laboratories: small networks trained and measured on their own, each with its tasks."""
