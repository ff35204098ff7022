"""Judges and timers, independent of tasks and models."""
