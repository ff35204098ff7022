"""Distance of sampled pictures from CIFAR-10: the Frechet distance of the features of a small classifier.

The distance is that of arXiv 1706.08500, but not on Inception features, so values are comparable only for the same
classifier (or the same TorchScript file). Every run trains the classifier, from a key.

Legend: N pictures, D features, P side in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from eval.experiments.cifar.pictures import NUM_CLASSES, Order, Pictures, cropped, flipped
from eval.experiments.plane.run import factor_at
from omni.config import Frozen
from omni.rng import Key
from train.optim.optimiser import Optimiser

CHUNK = 1000  # pictures per batch of features


class ClassifierOptions(Frozen):
    """width: channels of the first layer, a quarter of the last. features: of the layer before the classes. rate: peak
    learning rate of stochastic gradient descent."""

    width: int = Field(default=64, ge=1)
    features: int = Field(default=256, ge=1)
    epochs: float = Field(default=12.0, gt=0)
    batch: int = Field(default=512, ge=2)
    rate: float = Field(default=0.2, gt=0)


class Unit(nn.Sequential):
    """Convolution of 3 x 3, batch normalisation, ReLU."""

    def __init__(self, inner: int, outer: int) -> None:
        super().__init__(nn.Conv2d(inner, outer, 3, padding=1, bias=False), nn.BatchNorm2d(outer), nn.ReLU())


class Residual(nn.Module):
    """x plus two convolutions of x."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(Unit(width, width), Unit(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


class Classifier(nn.Module):
    """A residual network of eight convolutions, similar to ResNet-9. Initial weights are keyed by name: renaming a
    layer changes every distance."""

    def __init__(self, options: ClassifierOptions, key: Key) -> None:
        super().__init__()
        w = options.width
        first = [Unit(3, w), Unit(w, 2 * w), nn.MaxPool2d(2), Residual(2 * w)]
        last = [Unit(2 * w, 4 * w), nn.MaxPool2d(2), Unit(4 * w, 4 * w), nn.MaxPool2d(2), Residual(4 * w)]
        self.body = nn.Sequential(*first, *last)
        self.squeeze = nn.Linear(4 * w, options.features)
        self.read = nn.Linear(options.features, NUM_CLASSES)
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                std = math.sqrt(2 / parameter[0].numel())
                parameter.detach().copy_(key.fold("initialise", name).normal(tuple(parameter.shape)) * std)

    def features(self, pixels_NPP3: Tensor) -> Tensor:
        """uint8 (N, P, P, 3) -> (N, D), none negative."""
        x = (pixels_NPP3.permute(0, 3, 1, 2).float() / 64 - 2).contiguous(memory_format=torch.channels_last)
        return F.relu(self.squeeze(self.body(x).mean((2, 3))))

    def forward(self, pixels_NPP3: Tensor) -> Tensor:
        """Logits (N, classes)."""
        return self.read(self.features(pixels_NPP3))


def train_classifier(pictures: Pictures, options: ClassifierOptions, key: Key) -> Classifier:
    """Train in bfloat16 on CUDA, on flipped and cropped pictures."""
    device, batch = pictures.labels.device, min(options.batch, len(pictures))
    classifier = Classifier(options, key).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    sgd = torch.optim.SGD(
        classifier.parameters(), lr=options.rate, momentum=0.9, nesterov=True, weight_decay=5e-4, foreach=True
    )
    optimiser = Optimiser({"sgd": sgd})
    order = Order(len(pictures), batch, key, device)
    steps = max(1, round(options.epochs * len(pictures) / batch))
    for step in range(steps):
        rows, draws = order.rows(step), key.fold("augment", step)
        pixels = cropped(flipped(pictures.pixels[rows], draws), draws)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = F.cross_entropy(classifier(pixels).float(), pictures.labels[rows], label_smoothing=0.1)
        loss.backward()
        optimiser.step(factor_at(step / steps, warmup=0.2))
        optimiser.zero_grad()
    return classifier.eval()


@torch.no_grad()
def accuracy(classifier: Classifier, pictures: Pictures) -> float:
    """Accuracy in percent."""
    guesses = torch.cat([classifier(part).argmax(-1) for part in pictures.pixels.split(CHUNK)])
    return 100 * float((guesses == pictures.labels).float().mean())


def load_features(path: str | Path, device: str) -> Callable[[Tensor], Tensor]:
    """uint8 (N, P, P, 3) -> (N, D) by a TorchScript module that takes uint8 (N, 3, P, P) and `return_features`, such as
    the Inception of StyleGAN's metrics, which resizes its input. ValueError where the file is not TorchScript."""
    try:
        module = torch.jit.load(str(path), map_location=device).eval()
    except (RuntimeError, ValueError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{str(path)!r} is no TorchScript module: {reason}") from None
    return lambda pixels: module(pixels.permute(0, 3, 1, 2), return_features=True)


@dataclass(frozen=True, eq=False)
class Moments:
    """Mean (D,) and covariance (D, D) of features, float64."""

    mean: Tensor
    covariance: Tensor


@torch.no_grad()
def moments(features: Callable[[Tensor], Tensor], pixels_NPP3: Tensor) -> Moments:
    """The moments of the features of uint8 pictures, on their device."""
    found = torch.cat([features(part).double() for part in pixels_NPP3.split(CHUNK)])
    return Moments(found.mean(0), torch.cov(found.T))


def frechet_distance(a: Moments, b: Moments) -> float:
    """|m_a - m_b|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2), of normal distributions with these moments. NaN if any is.

    The product under the root is symmetric and has the eigenvalues of A B.
    """
    parts = (a.mean, a.covariance, b.mean, b.covariance)
    if not all(bool(part.isfinite().all()) for part in parts):
        return math.nan
    values, vectors = torch.linalg.eigh(a.covariance)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    overlap = torch.linalg.eigvalsh(root @ b.covariance @ root).clamp(min=0).sqrt().sum()
    return float((a.mean - b.mean).pow(2).sum() + a.covariance.trace() + b.covariance.trace() - 2 * overlap)
