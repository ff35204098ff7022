"""Training program: `python -m train RECIPE.toml [key=value ...]`. Part of the checkout, never of the wheel."""
