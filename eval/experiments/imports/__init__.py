"""Imported language models: the memory that an import needs, and greedy text against transformers."""
