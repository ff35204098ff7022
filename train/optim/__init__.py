"""Optimisers, and the averages of weights that follow them."""
