"""Training data: endless, pure sources of Documents, their mixture, and the packing loader."""
