"""Models that other people wrote, in plain PyTorch: what tests and benchmarks of `fastgen.accelerate` run on.

`TINY` holds them as small as they get, for tests; `MODELS` in the sizes in which people use them, for benchmarks. Both
have the same names. Built from diffusers and denoising-diffusion-pytorch, or written out as their authors published
them: DCGAN (Radford et al. 2016, in the form of PyTorch's tutorial), CycleGAN's generator (Zhu et al. 2017) and a plain
variational autoencoder (Kingma & Welling 2014). Nothing here calls fastgen.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from types import ModuleType
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Size = int | tuple[int, int]
Call = tuple[tuple, dict[str, Any]]
# Called by denoising-diffusion-pytorch's trainers and never by its networks.
NOT_NEEDED = ("accelerate", "ema_pytorch", "scipy", "scipy.optimize", "torchvision")


@dataclass(frozen=True)
class Foreign:
    """One model of other people. ``package``: what must be installed for it, None where torch is enough.

    make() -> the network, on torch's generator; draw(batch, (height, width)) -> the arguments of one
    call, on it too; loss(output, args) -> the scalar that a training step goes down on; size: pixels of
    the input, [height, width] if they differ. A ``gan`` is two networks that train against one another:
    an nn.ModuleDict of a generator and a discriminator, and its call is the generator's.
    """

    name: str
    make: Callable[[], nn.Module]
    draw: Callable[[int, tuple[int, int]], Call]
    loss: Callable[[Any, tuple], Tensor]
    size: Size
    package: str | None = None
    gan: bool = False

    def installed(self) -> bool:
        """Whether `build` finds the package that it needs; imports nothing."""
        return self.package is None or importlib.util.find_spec(self.package) is not None

    def build(self, seed: int = 0) -> nn.Module:
        """The network in training mode, fp32 on the CPU: the same weights for the same seed. Norms and biases differ
        from 1 and 0, as in a trained one, so that what forgets them shows."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = self.make()
            with torch.no_grad():
                for p in model.parameters():
                    if p.ndim == 1:
                        p.add_(0.1 * torch.randn_like(p))
                for name, b in model.named_buffers():
                    if name.endswith("running_mean"):
                        b.normal_(0, 0.1)
                    elif name.endswith("running_var"):
                        b.uniform_(0.5, 1.5)
        return model

    def inputs(self, model: nn.Module, batch: int = 2, size: Size | None = None, seed: int = 0) -> Call:
        """(args, kwargs) of one call, the same for the same seed; tensors on the model's device, floating ones in its
        dtype. size: pixels, the model's own by default."""
        size = self.size if size is None else size
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            args, kwargs = self.draw(batch, (size, size) if isinstance(size, int) else size)
        like = next(model.parameters())

        def moved(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            return x.to(like.device, like.dtype if x.is_floating_point() else None)

        return tuple(map(moved, args)), {k: moved(v) for k, v in kwargs.items()}


def tensor(output: Any) -> Tensor:
    """The first tensor that a model returns: itself, an element of a tuple, or diffusers' ``.sample``."""
    if isinstance(output, Tensor):
        return output
    return output[0] if isinstance(output, tuple) else output.sample


def train(model: nn.Module, foreign: Foreign, steps: int = 3, seed: int = 0, batch: int = 4) -> list[float]:
    """Trains ``model`` in place, AdamW or for a GAN Adam, and returns the loss of each step (of a GAN both networks',
    the discriminator's first). The same data and random numbers for the same seed, whatever was drawn before."""
    model.train()
    step = gan_step if foreign.gan else plain_step
    networks = list(model.values()) if foreign.gan else [model]
    kind, options = (torch.optim.Adam, {"lr": 2e-4, "betas": (0.5, 0.999)}) if foreign.gan else (torch.optim.AdamW, {})
    optimizers = [kind(network.parameters(), **options) for network in networks]
    losses: list[float] = []
    for i in range(steps):
        args, kwargs = foreign.inputs(model, batch, seed=seed * 1000 + i)
        torch.manual_seed(seed * 1000 + i)  # dropout, and the noise of autoencoders
        losses += step(model, foreign, optimizers, args, kwargs)
    return losses


def plain_step(model: nn.Module, foreign: Foreign, optimizers: list, args: tuple, kwargs: dict) -> list[float]:
    optimizers[0].zero_grad()
    loss = foreign.loss(model(*args, **kwargs), args)
    loss.backward()
    optimizers[0].step()
    return [loss.item()]


def gan_step(model: nn.ModuleDict, foreign: Foreign, optimizers: list, args: tuple, kwargs: dict) -> list[float]:
    """The tutorial's: the discriminator on real and on made images, then the generator against it."""
    generator, discriminator = model["generator"], model["discriminator"]
    real = torch.tanh(torch.randn_like(generator(*args)))

    def bce(images: Tensor, label: float) -> Tensor:
        p = discriminator(images).view(-1)
        return F.binary_cross_entropy(p, torch.full_like(p, label))

    optimizers[1].zero_grad()
    fake = generator(*args)
    d_loss = bce(real, 1.0) + bce(fake.detach(), 0.0)
    d_loss.backward()
    optimizers[1].step()
    optimizers[0].zero_grad()
    g_loss = bce(fake, 1.0)
    g_loss.backward()
    optimizers[0].step()
    return [d_loss.item(), g_loss.item()]


# diffusers


def unet2d(channels: tuple[int, ...], attention: tuple[int, ...], **options: Any) -> Callable[[], nn.Module]:
    """Makes a UNet2DModel with these channels and with attention on the levels ``attention``, on the way up too."""

    def make() -> nn.Module:
        from diffusers import UNet2DModel

        kinds = ["Attn" if i in attention else "" for i in range(len(channels))]
        return UNet2DModel(
            block_out_channels=channels, down_block_types=tuple(f"{k}DownBlock2D" for k in kinds),
            up_block_types=tuple(f"{k}UpBlock2D" for k in reversed(kinds)), **options,
        )  # fmt: skip

    return make


# Those of the DDPM that diffusers' users load for 32×32 pixels.
CIFAR10 = {
    "layers_per_block": 2, "norm_eps": 1e-6, "downsample_padding": 0, "flip_sin_to_cos": False, "freq_shift": 1,
    "dropout": 0.0,
}  # fmt: skip
ATTENTION = {
    "layers_per_block": 1, "resnet_time_scale_shift": "scale_shift", "num_class_embeds": 10, "attention_head_dim": 16,
}  # fmt: skip
DROPOUT = {"layers_per_block": 1, "dropout": 0.1, "norm_num_groups": 12, "downsample_type": "resnet",
           "upsample_type": "resnet", "act_fn": "gelu"}  # fmt: skip


def conditional(channels: tuple[int, ...], width: int, layers: int) -> Callable[[], nn.Module]:
    """Makes a UNet2DConditionModel on latents, that attends to ``width`` features of a text on all levels but one."""

    def make() -> nn.Module:
        from diffusers import UNet2DConditionModel

        crossed = len(channels) - 1
        return UNet2DConditionModel(
            block_out_channels=channels, layers_per_block=layers, cross_attention_dim=width, attention_head_dim=8,
            down_block_types=("CrossAttnDownBlock2D",) * crossed + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * crossed,
        )  # fmt: skip

    return make


def autoencoder(channels: tuple[int, ...], layers: int) -> nn.Module:
    from diffusers import AutoencoderKL

    n = len(channels)
    return AutoencoderKL(
        block_out_channels=channels, layers_per_block=layers, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * n, up_block_types=("UpDecoderBlock2D",) * n,
    )  # fmt: skip


class Decode(nn.Module):
    """An autoencoder's way back, latents [N, 4, H, W] -> images: what a latent diffusion model does for each image."""

    def __init__(self, vae: nn.Module) -> None:
        super().__init__()
        self.vae = vae
        vae.encoder = vae.quant_conv = None

    def forward(self, z: Tensor) -> Tensor:
        return self.vae.decode(z).sample


# denoising-diffusion-pytorch


@contextmanager
def stubs(names: tuple[str, ...]) -> Iterator[None]:
    """Modules that answer to every name stand in for those, only while this lasts."""
    before = {name: sys.modules.get(name) for name in names}
    for name in names:
        stub = ModuleType(name)
        stub.__getattr__ = lambda attribute: mock.MagicMock(name=attribute)
        stub.__path__ = []
        sys.modules[name] = stub
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


def lucidrains(dim: int, mults: tuple[int, ...], **options: Any) -> Callable[[], nn.Module]:
    """Makes denoising-diffusion-pytorch's Unet. The package is installed without what its trainers need."""

    def make() -> nn.Module:
        importlib.import_module("einops.layers.torch")  # before the stubs: it stays
        with stubs(NOT_NEEDED):
            package = importlib.import_module("denoising_diffusion_pytorch")
        return package.Unet(dim, dim_mults=mults, **options)

    return make


# Written out


def dcgan_init(m: nn.Module) -> None:
    """Section 4 of the paper, as the tutorial has it."""
    if isinstance(m, nn.Conv2d | nn.ConvTranspose2d):
        nn.init.normal_(m.weight, 0.0, 0.02)
    elif isinstance(m, nn.BatchNorm2d):
        nn.init.normal_(m.weight, 1.0, 0.02)
        nn.init.zeros_(m.bias)


def dcgan_generator(ngf: int = 64, nz: int = 100, nc: int = 3) -> nn.Sequential:
    """z [N, nz, 1, 1] -> images [N, nc, 64, 64] in [-1, 1]."""
    layers: list[nn.Module] = []
    for i, (c, k) in enumerate(pairwise((nz, ngf * 8, ngf * 4, ngf * 2, ngf))):
        layers.append(nn.ConvTranspose2d(c, k, 4, 2 if i else 1, 1 if i else 0, bias=False))
        layers += [nn.BatchNorm2d(k), nn.ReLU(True)]
    layers += [nn.ConvTranspose2d(ngf, nc, 4, 2, 1, bias=False), nn.Tanh()]
    return nn.Sequential(*layers).apply(dcgan_init)


def dcgan_discriminator(ndf: int = 64, nc: int = 3) -> nn.Sequential:
    """Images [N, nc, 64, 64] -> how likely they are real [N, 1, 1, 1], in (0, 1)."""
    layers: list[nn.Module] = [nn.Conv2d(nc, ndf, 4, 2, 1, bias=False), nn.LeakyReLU(0.2, inplace=True)]
    for c, k in pairwise((ndf, ndf * 2, ndf * 4, ndf * 8)):
        layers += [nn.Conv2d(c, k, 4, 2, 1, bias=False), nn.BatchNorm2d(k), nn.LeakyReLU(0.2, inplace=True)]
    layers += [nn.Conv2d(ndf * 8, 1, 4, 1, 0, bias=False), nn.Sigmoid()]
    return nn.Sequential(*layers).apply(dcgan_init)


def dcgan(width: int) -> nn.ModuleDict:
    return nn.ModuleDict({"generator": dcgan_generator(width), "discriminator": dcgan_discriminator(width)})


class ResidualBlock(nn.Module):
    def __init__(self, dim: int, norm: type[nn.Module]) -> None:
        super().__init__()
        bias = norm is nn.InstanceNorm2d
        self.conv_block = nn.Sequential(
            nn.ReflectionPad2d(1), nn.Conv2d(dim, dim, 3, bias=bias), norm(dim), nn.ReLU(True),
            nn.ReflectionPad2d(1), nn.Conv2d(dim, dim, 3, bias=bias), norm(dim),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv_block(x)


def cyclegan(ngf: int, blocks: int, norm: type[nn.Module]) -> Callable[[], nn.Module]:
    """Makes CycleGAN's generator, images -> images [N, 3, H, W] in [-1, 1]: two steps down, ``blocks`` residual blocks,
    two steps up. norm: nn.InstanceNorm2d, the paper's, whose convolutions have a bias, or nn.BatchNorm2d."""

    def make() -> nn.Module:
        bias = norm is nn.InstanceNorm2d
        layers = [nn.ReflectionPad2d(3), nn.Conv2d(3, ngf, 7, bias=bias), norm(ngf), nn.ReLU(True)]
        for c in (ngf, ngf * 2):
            layers += [nn.Conv2d(c, c * 2, 3, stride=2, padding=1, bias=bias), norm(c * 2), nn.ReLU(True)]
        layers += [ResidualBlock(ngf * 4, norm) for _ in range(blocks)]
        for c in (ngf * 4, ngf * 2):
            up = nn.ConvTranspose2d(c, c // 2, 3, stride=2, padding=1, output_padding=1, bias=bias)
            layers += [up, norm(c // 2), nn.ReLU(True)]
        return nn.Sequential(*layers, nn.ReflectionPad2d(3), nn.Conv2d(ngf, 3, 7), nn.Tanh())

    return make


class VAE(nn.Module):
    """Images [N, 3, 32, 32] in [0, 1] -> (images, mu [N, latent], logvar [N, latent])."""

    def __init__(self, channels: tuple[int, ...], latent: int) -> None:
        super().__init__()
        self.top = channels[-1]
        down: list[nn.Module] = []
        for c, k in pairwise((3, *channels)):
            down += [nn.Conv2d(c, k, 3, stride=2, padding=1), nn.BatchNorm2d(k), nn.LeakyReLU()]
        up: list[nn.Module] = []
        for c, k in pairwise((*reversed(channels), channels[0])):
            up += [
                nn.ConvTranspose2d(c, k, 3, stride=2, padding=1, output_padding=1),
                nn.BatchNorm2d(k),
                nn.LeakyReLU(),
            ]
        features = self.top * (32 >> len(channels)) ** 2
        self.encoder = nn.Sequential(*down)
        self.fc_mu, self.fc_var = nn.Linear(features, latent), nn.Linear(features, latent)
        self.decoder_input = nn.Linear(latent, features)
        self.decoder = nn.Sequential(*up, nn.Conv2d(channels[0], 3, 3, padding=1), nn.Sigmoid())

    def reparameterize(self, mu: Tensor, logvar: Tensor) -> Tensor:
        std = torch.exp(0.5 * logvar)
        eps = torch.randn_like(std)
        return mu + eps * std

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = self.encoder(x)
        flat = torch.flatten(h, start_dim=1)
        mu, logvar = self.fc_mu(flat), self.fc_var(flat)
        z = self.reparameterize(mu, logvar)
        return self.decoder(self.decoder_input(z).view(h.shape)), mu, logvar


# What they are called with


def noisy(channels: int = 3, **more: Callable[[int], Any]) -> Callable[[int, tuple[int, int]], Call]:
    """Noisy images and timesteps; ``more`` are keyword arguments, made from the batch."""

    def draw(batch: int, size: tuple[int, int]) -> Call:
        x, t = torch.randn(batch, channels, *size), torch.randint(1000, (batch,))
        return (x, t), {name: make(batch) for name, make in more.items()}

    return draw


def latents(channels: int, *, spatial: bool = True) -> Callable[[int, tuple[int, int]], Call]:
    return lambda batch, size: ((torch.randn(batch, channels, *(size if spatial else (1, 1))),), {})


def images(low: float = -1.0, **more: Any) -> Callable[[int, tuple[int, int]], Call]:
    """Images [N, 3, H, W] in [low, 1]."""
    return lambda batch, size: ((torch.rand(batch, 3, *size) * (1 - low) + low,), more)


def against_input(output: Any, args: tuple) -> Tensor:
    """Mean squared error against what went in: an autoencoder's loss, and a denoiser's where all is noise."""
    return F.mse_loss(tensor(output), args[0])


def power(output: Any, args: tuple) -> Tensor:
    return tensor(output).square().mean()


def called_real(output: Any, args: tuple) -> Tensor:
    return F.binary_cross_entropy(output, torch.ones_like(output))


def elbo(output: Any, args: tuple) -> Tensor:
    """The negative evidence lower bound per image, in nats up to a constant."""
    made, mu, logvar = output
    kl = torch.mean(-0.5 * torch.sum(1 + logvar - mu**2 - logvar.exp(), dim=1))
    return F.mse_loss(made, args[0], reduction="sum") / len(mu) + kl


def _labels(batch: int) -> Tensor:
    return torch.randint(10, (batch,))


def _text(width: int) -> Callable[[int], Tensor]:
    return lambda batch: torch.randn(batch, 77, width)


def _table(*rows: Foreign) -> dict[str, Foreign]:
    return {row.name: row for row in rows}


def _models(tiny: bool) -> dict[str, Foreign]:
    def pick(small: Any, full: Any) -> Any:
        return small if tiny else full

    channels, width, df = pick((32, 64), (128, 256, 256)), pick(32, 768), "diffusers"
    vae, gan, cycle = pick(((32, 64), 1), ((128, 256, 512, 512), 2)), pick(8, 64), pick((8, 2), (64, 9))
    cifar10, layers = pick((32, 64), (128, 256, 256, 256)), pick(1, 2)
    odd = pick((24, 48), (96, 192, 384))
    text = noisy(4, encoder_hidden_states=_text(width))
    return _table(
        Foreign("unet2d-cifar10", unet2d(cifar10, (1,), **CIFAR10), noisy(), against_input, pick(16, 32), df),
        Foreign("unet2d-attention", unet2d(channels, tuple(range(len(channels))), **ATTENTION),
                noisy(class_labels=_labels), against_input, pick(16, 32), df),
        Foreign("unet2d-dropout", unet2d(odd, (len(odd) - 1,), **DROPOUT), noisy(), against_input,
                pick((12, 20), (24, 40)), df),
        Foreign("unet2d-condition", conditional(channels, width, layers), text, against_input, pick(16, 32), df),
        Foreign("autoencoder-kl", lambda: autoencoder(*vae), images(sample_posterior=True), against_input,
                pick(16, 256), df),
        Foreign("autoencoder-kl-decode", lambda: Decode(autoencoder(*vae)), latents(4), power, pick(8, 64), df),
        Foreign("denoising-diffusion-pytorch", lucidrains(pick(16, 64), pick((1, 2), (1, 2, 4, 8))), noisy(),
                against_input, pick(16, 32), "denoising_diffusion_pytorch"),
        Foreign("dcgan", lambda: dcgan(gan), latents(100, spatial=False), power, 64, gan=True),
        Foreign("dcgan-generator", lambda: dcgan_generator(gan), latents(100, spatial=False), power, 64),
        Foreign("dcgan-discriminator", lambda: dcgan_discriminator(gan), images(), called_real, 64),
        Foreign("cyclegan-instance", cyclegan(*cycle, nn.InstanceNorm2d), images(), against_input, pick(16, 256)),
        Foreign("cyclegan-batch", cyclegan(*cycle, nn.BatchNorm2d), images(), against_input, pick(16, 256)),
        Foreign("vae", lambda: VAE(pick((8, 16), (32, 64, 128, 256)), pick(8, 128)), images(0.0), elbo, 32),
    )  # fmt: skip


TINY = _models(tiny=True)
MODELS = _models(tiny=False)
