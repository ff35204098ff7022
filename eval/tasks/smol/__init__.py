"""Requests of people, in everyday English, to a published language model that draws emoji."""
