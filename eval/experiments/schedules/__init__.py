"""Schedules over blocks and times on a Gaussian sequence: the exact covariance of the output of any schedule."""
