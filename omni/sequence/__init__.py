"""Where everything stands: layout, mask, rotary positions, what guidance drops. Integers; no network."""
