"""Layout, mask, rotary positions, schedules of blocks, and the reduced histories of guidance. Integers; no network."""
