"""Programs around training: averages, other tokenizers, curves, sheets."""
