"""Chats of people who ask for pictures of emoji, in everyday English, for a published language model."""
