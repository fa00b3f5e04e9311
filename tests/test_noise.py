"""Noise belongs to the image: known answers, the same bits everywhere, and the statistics of a normal."""

from __future__ import annotations

import pytest
import torch
from scipy import stats
from suite import VIEWS, places

from fastgen import ops
from fastgen.ops import Stream, philox_bits, philox_bits_reference, philox_normal, philox_normal_reference

NORMAL, BITS = places("philox_normal"), places("philox_bits")
KERNELS = [p for p in NORMAL if p.backend != "reference"]
EDGES = torch.tensor([0, 1, -1, 2**31, -(2**31), 2**32, 2**63 - 1, -(2**63), 0x299F31D0A4093822])
STEPS = (0, 1, 999, 2**31 - 1, 2**31, 2**32 - 1)


def philox(counter: list[int], key: int) -> list[int]:
    """Philox-4x32-10 in Python's integers, from the paper's figure: what everything here is held against."""
    c, k0, k1 = list(counter), key & 0xFFFFFFFF, key >> 32 & 0xFFFFFFFF
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [p1 >> 32 ^ c[1] ^ k0, p1 & 0xFFFFFFFF, p0 >> 32 ^ c[3] ^ k1, p0 & 0xFFFFFFFF]
        k0, k1 = k0 + 0x9E3779B9 & 0xFFFFFFFF, k1 + 0xBB67AE85 & 0xFFFFFFFF
    return c


def test_known_answers():
    from test_common_maths import KNOWN

    for counter, (low, high), expected in KNOWN:
        assert philox(counter, low | high << 32) == list(expected)


@pytest.mark.parametrize("place", BITS, ids=str)
def test_bits_are_the_paper_s(place):
    """The first known answer directly; for every other counter that has 0 as its last word, Python's integers."""
    zeros = philox_bits(torch.tensor([0], device=place.device), 4, backend=place.backend)
    assert [f"{w:08x}" for w in zeros[0].tolist()] == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]
    for step, stream in ((0, 0), (7, 2), (2**31, 2**31 + 1), (2**32 - 1, 2**32 - 1)):
        actual = philox_bits(EDGES.to(place.device), 10, step, stream, backend=place.backend)
        for row, seed in zip(actual.tolist(), EDGES.tolist(), strict=True):
            words = [w for block in range(3) for w in philox([block, step, stream, 0], seed % 2**64)]
            assert row == words[:10]


@pytest.mark.parametrize("place", BITS, ids=str)
def test_bits_far_into_an_image(place):
    n = 4100 if place.interpreted else 100_003
    seeds = EDGES[-3:].to(place.device)
    assert torch.equal(philox_bits(seeds, n, 3, 1, backend=place.backend), philox_bits_reference(seeds, n, 3, 1))


@pytest.mark.parametrize("place", KERNELS, ids=str)
def test_normals_are_the_references_bit_for_bit(place):
    n = 20_000 if place.interpreted else 1_500_001  # more than a million from one seed: radii and angles of all kinds
    for seeds in (EDGES[2:3], EDGES[-1:]):
        seeds = seeds.to(place.device)
        actual = philox_normal(seeds, (n,), 12, Stream.STEP, backend=place.backend)
        assert torch.equal(actual.cpu(), philox_normal_reference(seeds.cpu(), (n,), 12, Stream.STEP))


@pytest.mark.parametrize("place", KERNELS, ids=str)
def test_edges_of_seed_step_and_stream(place):
    streams = (*Stream, 2**32 - 1)
    for i, step in enumerate(STEPS):
        for stream in streams[i : i + 1] if place.interpreted else streams:
            actual = philox_normal(EDGES.to(place.device), (3, 3), step, stream, backend=place.backend)
            assert torch.equal(actual.cpu(), philox_normal_reference(EDGES, (3, 3), step, stream))


@pytest.mark.parametrize("place", NORMAL, ids=str)
def test_an_images_noise_is_its_own(place):
    """Any batch size, any order, any strides of the seeds, any way to cut the same number of elements into a shape."""
    images = 16 if place.interpreted else 64
    seeds = torch.arange(images, device=place.device) * 31 - 900
    full = philox_normal(seeds, (3, 5, 7), 4, backend=place.backend)
    for n in (1, 3, 8, images - 1):
        assert torch.equal(philox_normal(seeds[:n], (3, 5, 7), 4, backend=place.backend), full[:n])
    order = torch.randperm(images, generator=torch.Generator().manual_seed(0)).to(place.device)
    assert torch.equal(philox_normal(seeds[order], (3, 5, 7), 4, backend=place.backend), full[order])
    for view in (VIEWS["every_second"], VIEWS["misaligned"]):
        assert torch.equal(philox_normal(view(seeds), (3, 5, 7), 4, backend=place.backend), full)
    assert torch.equal(philox_normal(seeds, (105,), 4, backend=place.backend), full.flatten(1))
    longer = philox_normal(seeds, (106,), 4, backend=place.backend)
    assert torch.equal(longer[:, :105], full.flatten(1))


@pytest.mark.parametrize("place", KERNELS, ids=str)
def test_ops_make_the_same_noise_in_every_layout(place):
    """Element (c, h, w) of an image gets the same number whether its channels lie first or last."""
    seeds, shape = EDGES[:3].to(place.device), (5, 6, 7)
    x = torch.zeros(3, *shape, device=place.device)
    t, table = (
        torch.tensor([0, 3, 9], device=place.device),
        torch.tensor([[0.0, 1.0]], device=place.device).repeat(10, 1),
    )
    row = torch.zeros(10, 9, device=place.device)
    row[:, 8] = 1
    step = torch.tensor(6, device=place.device)
    for layout in (torch.contiguous_format, torch.channels_last):
        y = x.contiguous(memory_format=layout)
        with_backend = {"seeds": seeds, "backend": place.backend}
        made = {
            (0, Stream.REPARAMETERIZE): ops.reparameterize(y, y, **with_backend)[0],
            (t, Stream.Q_SAMPLE): ops.q_sample(y, t, table, **with_backend)[0],
            (6, Stream.STEP): ops.diffusion_step(y, y, row, step, **with_backend)[0],
        }
        for (at, stream), noise in made.items():
            assert noise.is_contiguous(memory_format=layout)
            assert torch.equal(noise, philox_normal_reference(seeds, shape, at, stream))


@pytest.mark.parametrize("place", NORMAL, ids=str)
def test_half_precision_is_the_fp32_draw_rounded(place):
    draw = philox_normal(EDGES.to(place.device), (99,), backend=place.backend)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        if not (place.interpreted and dtype == torch.bfloat16):
            assert torch.equal(
                philox_normal(EDGES.to(place.device), (99,), dtype=dtype, backend=place.backend), draw.to(dtype)
            )


# Statistics, on fixed seeds: what passes once passes always. Bounds are five standard deviations and more.


def sample(seed: int = 1, n: int = 1_000_000, step: int = 0, stream: int = 0) -> torch.Tensor:
    return philox_normal(torch.tensor([seed]), (n,), step, stream)[0].double()


def test_moments():
    z, n = sample(), 1_000_000
    assert abs(z.mean()) < 5 / n**0.5
    assert abs(z.var() - 1) < 5 * (2 / n) ** 0.5
    assert abs((z**3).mean()) < 5 * (15 / n) ** 0.5
    assert abs((z**4).mean() - 3) < 5 * (96 / n) ** 0.5
    assert 4.5 < z.abs().max() < 5.8


def test_distribution():
    """Kolmogorov-Smirnov; within one image, and over the first pixel of many images with adjacent seeds."""
    assert stats.kstest(sample(2).numpy(), "norm").pvalue > 1e-3
    first = philox_normal(torch.arange(200_000), (1,))[:, 0]
    assert stats.kstest(first.double().numpy(), "norm").pvalue > 1e-3


def test_bits_are_uniform():
    words = philox_bits(torch.tensor([3]), 1_000_000)[0]
    for shift in (0, 8, 16, 24):
        counts = torch.bincount(words >> shift & 255, minlength=256)
        assert stats.chisquare(counts.numpy()).pvalue > 1e-3
    ones = torch.stack([(words >> bit & 1).double().mean() for bit in range(32)])
    assert (ones - 0.5).abs().max() < 5 * 0.5e-3


def test_independence():
    """Across seeds (either half of the key), steps, streams and neighbours; values, squares and absolute values."""
    base = sample(7)
    others = {
        "next seed": sample(8),
        "seed + 2**32": sample(7 + 2**32),
        "minus seed": sample(-7),
        "next step": sample(7, step=1),
        "next stream": sample(7, stream=1),
        "neighbour": base.roll(1),
        "next but one": base.roll(2),
        "next block": base.roll(4),
    }
    for name, other in others.items():
        for f in (lambda z: z, torch.square, torch.abs):
            r = torch.corrcoef(torch.stack([f(base), f(other)]))[0, 1]
            assert abs(r) < 5e-3, name


def test_adjacent_seeds_share_nothing():
    """The correlation matrix of 64 images with adjacent seeds, and of 64 steps of one image."""
    many = philox_normal(torch.arange(64), (4096,)).double()
    steps = torch.cat([philox_normal(torch.tensor([5]), (4096,), step) for step in range(64)]).double()
    for z in (many, steps):
        off = torch.corrcoef(z) - torch.eye(64)
        assert off.abs().max() < 6 / 64  # 4096 ** -0.5 is one standard deviation
        assert abs(off.square().sum() / (64 * 63) * 4096 - 1) < 0.2
    words = philox_bits(torch.arange(4096), 64)
    assert len(words.unique()) > words.numel() - 32  # of 2**18 words in 2**32, 8 repeats are expected


def test_streams_have_the_numbers_of_the_header():
    from test_common_maths import COMMON

    if not COMMON.is_dir():
        pytest.skip("not a checkout: csrc/common is missing")
    text = (COMMON / "philox.h").read_text().replace("_", "").lower()
    for stream in Stream:
        assert f"kstream{stream.name.replace('_', '').lower()} = {int(stream)}," in text
