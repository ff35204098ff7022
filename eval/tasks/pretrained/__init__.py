"""Published checkpoints behind Omni's faces, compared with the published implementation."""
