"""Gaussian data as the oracle of objectives and samplers; the laboratory has them too: see eval/toy/gaussian.py."""

from eval.toy.gaussian import LINE, PLANE, Gaussian, GaussianCall, gaussian_items

__all__ = ["LINE", "PLANE", "Gaussian", "GaussianCall", "gaussian_items"]
