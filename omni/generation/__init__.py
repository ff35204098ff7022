"""Generation with one model: the engine and what it is made of. See README.md."""
