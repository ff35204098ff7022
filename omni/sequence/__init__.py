"""Layout, mask, rotary positions, and the reduced histories of guidance. Integers only; no network."""
