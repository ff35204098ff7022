"""The transformer, its attention backends and its cache. No modality, no objective in here."""
