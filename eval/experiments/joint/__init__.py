"""Exactly known joint distributions of tokens, and the training of heads on them."""
