"""Small problems whose answer is known or measurable in seconds: Gaussians with a closed-form flow map, 2-D data."""
