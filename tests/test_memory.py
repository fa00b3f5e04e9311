"""Peak memory of the fused ops on a CPU: at most that of plain PyTorch, 64 MB, and the cache of weights."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from fastgen import backends

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
    pytest.mark.skipif(backends.library_error("cpu") is not None, reason=str(backends.library_error("cpu"))),
]
ALLOWED = 64 << 20

# The setting, and what is called in it: f(ours). Ten calls, so that what is kept from call to call shows.
CASES = {
    "unet": """
from fastgen.models import unet
net = unet.UNet(unet.PRESETS["cifar10"]).eval()
x, t = torch.randn(4, 3, 32, 32), torch.full((4,), 500)
def f(ours):
    with torch.no_grad(), fastgen.use_backend("cpp" if ours else "reference"): net(x, t)
""",
    "norm_act_conv2d": """
x, w = torch.randn(1, 128, 256, 256).to(memory_format=torch.channels_last), torch.randn(128, 128, 3, 3)
def f(ours):
    with torch.no_grad():
        if ours: return ops.norm_act_conv2d(x, w, padding=1, num_groups=32)
        return F.conv2d(F.silu(F.group_norm(x, 32)), w, padding=1)
""",
    "training": """
x = torch.randn(4, 128, 64, 64).to(memory_format=torch.channels_last)
w = torch.randn(128, 128, 3, 3, requires_grad=True)
def f(ours):
    w.grad = None
    h = x.clone().requires_grad_()
    if ours: y = ops.norm_act_conv2d(h, w, padding=1, num_groups=32)
    else: y = F.conv2d(F.silu(F.group_norm(h, 32)), w, padding=1)
    y.square().mean().backward()
""",
    "attention": """
q, k, v = (torch.randn(4, 4, 1024, 64, requires_grad=True) for _ in range(3))
def f(ours):
    y = ops.attention(q, k, v, backend="cpp") if ours else F.scaled_dot_product_attention(q, k, v)
    y.square().mean().backward()
""",
    "reparameterize": """
mu, logvar = (torch.randn(4096, 512, requires_grad=True) for _ in range(2))
seeds = torch.arange(4096)
def f(ours):
    if ours: z, kl = ops.reparameterize(mu, logvar, seeds=seeds)
    else: z, kl = mu + (logvar / 2).exp() * torch.randn_like(mu), 0.5 * (logvar.exp() + mu * mu - 1 - logvar).sum(1)
    (z.square().mean() + kl.mean()).backward()
""",
}
PROGRAM = """
import sys
import torch
import torch.nn.functional as F
import fastgen
from fastgen import ops
from fastgen.ops.weights import CACHE
torch.set_num_threads(2)
torch.manual_seed(0)
{case}
ops.to_uint8(torch.zeros(1, 3, 2, 2))  # the library is loaded
def status(key):
    line = next(line for line in open("/proc/self/status") if line.startswith(key))
    return int(line.split()[1]) << 10
before = status("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
for _ in range(10):
    f(sys.argv[1] == "ours")
print(status("VmHWM") - before, CACHE.bytes)
"""


def peak(case: str, which: str) -> tuple[int, int]:
    """Bytes that a process takes at its peak beyond what it began with, bytes of them in the cache of weights."""
    program = PROGRAM.replace("{case}", CASES[case])
    # Otherwise glibc keeps what was freed or not as its moods are: a measure of that.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "FASTGEN_BACKEND": ""}
    done = subprocess.run(
        [sys.executable, "-c", program, which], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    total, cached = done.stdout.split()
    return int(total), int(cached)


@pytest.mark.parametrize("case", CASES)
def test_peak_is_that_of_pytorch(case: str) -> None:
    eager, _ = peak(case, "eager")
    ours, cached = peak(case, "ours")
    print(f"{case}: eager {eager >> 20} MB, fastgen {ours >> 20} MB, of which {cached >> 20} MB cached weights")
    assert ours <= eager + ALLOWED + cached
