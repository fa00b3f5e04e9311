"""reparameterize: the suite, and its KL, its arguments, extreme values."""

import pytest
import torch
from suite import OpSuite, places

from fastgen import testing
from fastgen.ops import Stream, philox_normal_reference, reparameterize


class TestReparameterize(OpSuite):
    op = "reparameterize"
    few = ("3x5-noise", "2x4x5x7-seeds")
    at_size = testing._reparameterize(3, 5, 67, 71, seeded=True)
    second_derivatives = True


PLACES = places("reparameterize")


def test_kl_is_that_of_torch_distributions():
    g = torch.Generator().manual_seed(0)
    mu, logvar = (torch.randn(4, 33, generator=g, dtype=torch.float64) for _ in range(2))
    normal, unit = torch.distributions.Normal(mu, (logvar / 2).exp()), torch.distributions.Normal(0.0, 1.0)
    expected = torch.distributions.kl_divergence(normal, unit).sum(1)
    for place in PLACES:
        _, kl = reparameterize(
            mu.to(place.device), logvar.to(place.device), torch.zeros_like(mu).to(place.device), backend=place.backend
        )
        torch.testing.assert_close(kl.cpu(), expected, rtol=1e-12, atol=1e-12)


def test_seeds_draw_the_stream_of_reparameterize():
    mu, seeds = torch.zeros(3, 2, 5), torch.tensor([0, -1, 2**62])
    expected = philox_normal_reference(seeds, (2, 5), 0, Stream.REPARAMETERIZE)
    for place in PLACES:
        z, _ = reparameterize(
            mu.to(place.device), mu.to(place.device), seeds=seeds.to(place.device), backend=place.backend
        )
        assert torch.equal(z.cpu(), expected)


def test_latents_without_elements():
    for place in PLACES:
        mu = torch.zeros(2, 0, device=place.device, requires_grad=True)
        z, kl = reparameterize(mu, mu, torch.zeros(2, 0, device=place.device), backend=place.backend)
        assert z.shape == (2, 0) and kl.tolist() == [0.0, 0.0]
        assert torch.autograd.grad(kl.sum(), mu, allow_unused=True)[0].shape == (2, 0)


def test_extreme_values_as_eager():
    inf, nan = float("inf"), float("nan")
    mu = torch.tensor([[0.0, nan, 1.0, inf, 1.0, -2.0]])
    logvar = torch.tensor([[-200.0, 0.0, 170.0, 0.0, -inf, nan]])
    for place in PLACES:
        args = [t.to(place.device) for t in (mu, logvar, torch.ones_like(mu))]
        z, kl = reparameterize(*args, backend=place.backend)
        torch.testing.assert_close(z.cpu(), mu + (logvar / 2).exp(), equal_nan=True)
        assert kl.isnan().all()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"logvar": torch.zeros(2, 4)}, "logvar"),
        ({"logvar": torch.zeros(2, 3, dtype=torch.float64)}, "logvar"),
        ({"noise": torch.zeros(2, 3, 1)}, "noise"),
        ({"noise": None}, "noise and seeds"),
        ({"seeds": torch.zeros(2, dtype=torch.int64)}, "noise and seeds"),
        ({"noise": None, "seeds": torch.zeros(3, dtype=torch.int64)}, "seeds"),
        ({"noise": None, "seeds": torch.zeros(2, dtype=torch.int32)}, "seeds"),
        ({"backend": "fortran"}, "fortran"),
    ],
)
def test_wrong_arguments(changes, message):
    good = {"mu": torch.zeros(2, 3), "logvar": torch.zeros(2, 3), "noise": torch.zeros(2, 3)}
    reparameterize(**good)
    with pytest.raises(ValueError, match=message):
        reparameterize(**good | changes)


@pytest.mark.parametrize("place", PLACES, ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_recording_gradients_changes_no_bit(place, channels_last):
    """Whether the noise is made in the kernel or kept for the backward."""
    mu, logvar = (torch.randn(3, 4, 9, 11, device=place.device) for _ in range(2))
    if channels_last:
        mu, logvar = (t.contiguous(memory_format=torch.channels_last) for t in (mu, logvar))
    seeds = torch.arange(3, device=place.device)
    plain = reparameterize(mu, logvar, seeds=seeds, backend=place.backend)
    recorded = reparameterize(mu.requires_grad_(), logvar, seeds=seeds, backend=place.backend)
    assert all(torch.equal(p, r) for p, r in zip(plain, recorded, strict=True))
