"""Published orders of generation as recipes, trained on the same clips at one budget."""
