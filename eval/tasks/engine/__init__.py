"""The stepping engine against itself: requests together and one after another, first pictures, later turns,
cancellations.

All rows are ratios of alternating runs on the bundled model, one thread, autoregressive decoding; a fresh engine per
run.
"""
