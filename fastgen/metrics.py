"""How good generated digits are, in the features of the shipped classifier: Fréchet distance, precision and recall,
label accuracy, and how near the images are to those trained on.

Needs the extra "metrics" (torchmetrics), and "data" for `evaluate`, which compares with mnist-5k.
Legend: N M images, F features, C H W image.
"""

from __future__ import annotations

import functools
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgen.arguments import check_module
from fastgen.backends import check_device, default_device
from fastgen.checkpoint import load
from fastgen.diffusion.samplers import Sampler
from fastgen.errors import UsageError
from fastgen.images import concatenate
from fastgen.sampling import stream
from fastgen.training.data import load_dataset

CLASSIFIER = "digits-classifier"
PERCENTILES = {"p1": 0.01, "p5": 0.05, "median": 0.5}
SHIFT = 2  # pixels, each way, that a copy may have been moved by


def _torchmetrics() -> Any:
    try:
        import torchmetrics
    except ImportError as error:
        raise ImportError("metrics need torchmetrics: pip install 'fastgen-kernels[metrics]'") from error
    return torchmetrics


@torch.inference_mode()
def features(images: Tensor, network: nn.Module | None = None, batch_size: int = 250) -> tuple[Tensor, Tensor]:
    """Features fp32 [N,F] and logits [N,K] of images uint8 [N,C,H,W]; ``network`` None is the shipped classifier.

    Raises ValueError where images have another dtype or rank.
    """
    if images.dtype != torch.uint8 or images.ndim != 4:
        raise ValueError(f"images must be uint8 [N, C, H, W], not {images.dtype} {list(images.shape)}")
    network = network or load(CLASSIFIER, device=default_device())
    device = next(network.parameters()).device
    found = [network.features(batch.to(device).float() / 127.5 - 1) for batch in images.split(batch_size)]
    seen = torch.cat(found)
    return seen.cpu(), network.classify(seen).cpu()


class _Identity(nn.Module):
    """Stands where torchmetrics expects a network: what it is given are features already."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_features = width

    def forward(self, x: Tensor) -> Tensor:
        return x


def frechet_distance(real: Tensor, generated: Tensor) -> float:
    """|mu_r - mu_g|² + tr(S_r + S_g - 2 (S_r S_g)^(1/2)) of features [N,F] and [M,F] (Heusel et al. 2017, eq. 6),
    by torchmetrics. At least two images on each side, and better many more than F. Raises ValueError otherwise."""
    _check_features(real, generated)
    _torchmetrics()
    from torchmetrics.image.fid import FrechetInceptionDistance

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about buffers, at every construction
        metric = FrechetInceptionDistance(feature=_Identity(real.shape[1]), normalize=True).set_dtype(torch.float64)
    metric.update(real.double(), real=True)
    metric.update(generated.double(), real=False)
    return max(0.0, metric.compute().item())


def precision_recall(real: Tensor, generated: Tensor, neighbours: int = 3) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al. 2019, eq. 1 and 2) of features [N,F] and [M,F].

    Precision is the share of generated images that lie within the distance of some real image to its
    k-th nearest real neighbour; recall is the same with the roles exchanged. Raises ValueError where
    a side has no k neighbours.
    """
    _check_features(real, generated)
    if min(len(real), len(generated)) <= neighbours:
        raise ValueError(f"neighbours must be below {min(len(real), len(generated))}, the images there are")

    def within(points: Tensor, support: Tensor) -> float:
        radius = torch.cdist(support, support).kthvalue(neighbours + 1, dim=1).values  # the first is itself
        return (torch.cdist(points, support) <= radius).any(dim=1).double().mean().item()

    real, generated = real.double(), generated.double()
    return within(generated, real), within(real, generated)


def _check_features(real: Tensor, generated: Tensor) -> None:
    if real.ndim != 2 or generated.ndim != 2 or real.shape[1] != generated.shape[1]:
        raise ValueError(
            f"real and generated must be [N, F] and [M, F], not {list(real.shape)}, {list(generated.shape)}"
        )
    if min(len(real), len(generated)) < 2:
        raise ValueError("real and generated must have at least two rows each")


def label_accuracy(logits: Tensor, labels: Tensor) -> float:
    """The share of images whose class, by logits [N,K], is the one in labels int64 [N]. By torchmetrics."""
    functional = _torchmetrics().functional.classification
    return functional.multiclass_accuracy(logits, labels, num_classes=logits.shape[1], average="micro").item()


def nearest_distance(images: Tensor, labels: Tensor, training: Tensor, training_labels: Tensor) -> Tensor:
    """The distance of each image [N,C,H,W] to the nearest training image [M,C,H,W] of its class, fp32 [N].

    Euclidean, over all pixels of uint8 images scaled to [0,1], and over training images moved by up to ±2
    pixels each way (what comes in at the edge is black): how far an image is from being a copy. Of a copy
    itself rounding leaves up to about 0.01.
    """
    x, y = images.float() / 255, training.float() / 255
    nearest = torch.full((len(x),), torch.inf)
    for label in labels.unique():
        mine, theirs = labels == label, y[training_labels == label]
        if not len(theirs):
            raise ValueError(f"training_labels must hold every class of labels; {label.item()} is not in it")
        H, W = theirs.shape[-2:]
        padded = F.pad(theirs, (SHIFT,) * 4)
        moves = [(i, j) for i in range(2 * SHIFT + 1) for j in range(2 * SHIFT + 1)]
        moved = torch.cat([padded[..., i : i + H, j : j + W].flatten(1) for i, j in moves])
        nearest[mine] = torch.cdist(x[mine].flatten(1), moved).amin(dim=1)
    return nearest


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found. Fréchet distances are to the held-out images; ``frechet_training`` is that of 1,000
    training images, the yardstick. ``nearest``: per class and percentile, the nearest-training-image distance of
    the samples over that of the held-out images."""

    model: str
    sha256: str
    sampler: str
    options: dict[str, Any]
    steps: int
    guidance: float
    n: int
    seed: int
    label_accuracy: float
    held_out_accuracy: float
    frechet: float
    frechet_training: float
    precision: float
    recall: float
    nearest: dict[int, dict[str, float]]

    @property
    def frechet_ratio(self) -> float:
        return self.frechet / self.frechet_training

    @property
    def nearest_least(self) -> float:
        """The least of all ratios in ``nearest``; well below 1 means that it copies (a rare copy does not show)."""
        return min(ratio for row in self.nearest.values() for ratio in row.values())

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "frechet_ratio": self.frechet_ratio, "nearest_least": self.nearest_least}

    def __str__(self) -> str:
        head = f"{self.model}: {self.n} images, {self.sampler}, {self.steps} steps, guidance {self.guidance:g}"
        rows = [
            (
                "the asked digit is read in",
                f"{self.label_accuracy:.1%} (held-out images: {self.held_out_accuracy:.1%})",
            ),
            ("Fréchet distance", f"{self.frechet:.3f} = {self.frechet_ratio:.2f} x that of training images"),
            ("precision, recall", f"{self.precision:.3f}, {self.recall:.3f}"),
            ("nearest training image", "distance over that of held-out images, by class"),
        ]
        lines = [head, *(f"  {a:<28}{b}" for a, b in rows)]
        lines.append("    class   " + "".join(f"{label:>7}" for label in self.nearest))
        for name in PERCENTILES:
            lines.append(f"    {name:<8}" + "".join(f"{row[name]:7.2f}" for row in self.nearest.values()))
        return "\n".join(lines)


def evaluate(
    model: str | Path | nn.Module,
    n: int = 1000,
    *,
    seed: int = 0,
    sampler: str | Sampler | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
    progress: bool | None = None,
) -> Evaluation:
    """Draws n images of a digit model, the ten classes in turn, and compares them with mnist-5k.

    model: a shipped name, a checkpoint folder, or a module. n: at least 50, and 1,000 for figures to quote; the
    other arguments are those of `fastgen.sample`. Raises UsageError for a model that draws no digits.
    """
    if isinstance(n, bool) or not isinstance(n, int) or n < 50:
        raise UsageError(f"n: must be a whole number of at least 50, not {n!r}")
    check_device(device)
    network = model if isinstance(model, nn.Module) else load(model, device=device or default_device())
    check_module(network)
    config = network.config
    name = getattr(network, "source", type(network).__name__)
    if (config.out_channels, config.image_size, config.num_classes) != (1, 28, 10):
        raise UsageError(
            f"model: {name} does not draw the ten digits in 28×28 pixels, which is all that is measured here"
        )
    labels = torch.arange(n) % config.num_classes
    batches = stream(  # checks the arguments at once, and draws when asked to
        network, n, seed=seed, labels=labels, sampler=sampler, steps=steps, guidance=guidance, batch_size=batch_size,
        device=device, progress=progress,
    )  # fmt: skip
    known = _reference()
    made = concatenate(list(batches))
    recipe = made.recipe
    generated, logits = features(made.images)
    precision, recall = precision_recall(known.features, generated)
    measured = _percentiles(nearest_distance(made.images, labels, known.training, known.training_labels), labels)
    nearest = {
        label: {name: row[name] / known.nearest[label][name] for name in PERCENTILES} for label, row in measured.items()
    }
    return Evaluation(
        model=name, sha256=recipe.sha256, sampler=recipe.sampler or type(sampler).__name__,
        options=recipe.options, steps=recipe.steps, guidance=recipe.guidance, n=n, seed=seed,
        label_accuracy=label_accuracy(logits, labels), held_out_accuracy=known.accuracy,
        frechet=frechet_distance(known.features, generated), frechet_training=known.frechet_training,
        precision=precision, recall=recall, nearest=nearest,
    )  # fmt: skip


@dataclass(frozen=True)
class _Reference:
    """What does not depend on the model that is evaluated."""

    training: Tensor
    training_labels: Tensor
    features: Tensor  # of the held-out images
    accuracy: float
    frechet_training: float
    nearest: dict[int, dict[str, float]]


@functools.lru_cache(maxsize=1)
def _reference() -> _Reference:
    training, training_labels = load_dataset("mnist-5k", "train")
    held_out, labels = load_dataset("mnist-5k", "test")
    real, logits = features(held_out)
    first = torch.cat([(training_labels == label).nonzero()[:100, 0] for label in labels.unique()])
    return _Reference(
        training,
        training_labels,
        real,
        label_accuracy(logits, labels),
        frechet_distance(real, features(training[first])[0]),
        _percentiles(nearest_distance(held_out, labels, training, training_labels), labels),
    )


def _percentiles(distances: Tensor, labels: Tensor) -> dict[int, dict[str, float]]:
    return {
        label: {name: distances[labels == label].quantile(q).item() for name, q in PERCENTILES.items()}
        for label in labels.unique().tolist()
    }
