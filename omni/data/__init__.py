"""Sources of Documents, used by training and evaluation."""
