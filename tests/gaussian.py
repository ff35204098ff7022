"""Gaussian data as the oracle of objectives and samplers, shared with the laboratory of the plane."""

from eval.experiments.plane.gaussian import LINE, PLANE, Gaussian, GaussianCall, gaussian_items

__all__ = ["LINE", "PLANE", "Gaussian", "GaussianCall", "gaussian_items"]
