"""Small problems with a known or quickly measured answer: Gaussians with a closed-form flow map, 2-D data."""
