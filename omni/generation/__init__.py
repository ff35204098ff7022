"""Generation with one model: the engine and its parts. See README.md."""
