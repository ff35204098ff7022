"""Files of any size, in pieces: written, hashed and synced."""
