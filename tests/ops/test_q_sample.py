"""q_sample: the suite, and its noise, its arguments."""

import pytest
import torch
from suite import OpSuite, places

from fastgen import testing
from fastgen.diffusion.schedules import DiffusionConfig, forward_table
from fastgen.ops import Stream, philox_normal_reference, q_sample


class TestQSample(OpSuite):
    op = "q_sample"
    few = ("3x2x5x7-noise", "5x3x9x11-seeds")
    at_size = testing._q_sample(3, 5, 67, 71, seeded=True)


PLACES = places("q_sample")
TABLE = forward_table(DiffusionConfig(timesteps=50))


def test_noise_is_that_of_each_images_own_step():
    t, seeds = torch.tensor([0, 7, 49, 7]), torch.tensor([5, 5, -3, 2**40])
    expected = torch.cat(
        [philox_normal_reference(s[None], (3, 5), int(i), Stream.Q_SAMPLE) for s, i in zip(seeds, t, strict=True)]
    )
    for place in PLACES:
        args = [a.to(place.device) for a in (torch.zeros(4, 3, 5), t, TABLE)]
        x_t, noise = q_sample(*args, seeds=seeds.to(place.device), backend=place.backend)
        assert torch.equal(noise.cpu(), expected)
        assert torch.equal(x_t.cpu(), expected * TABLE[t][:, 1, None, None])


def test_given_noise_comes_back_itself():
    noise = torch.randn(2, 3)
    for place in PLACES:
        given = noise.to(place.device)
        _, back = q_sample(
            given,
            torch.zeros(2, dtype=torch.int64, device=place.device),
            TABLE.to(place.device),
            given,
            backend=place.backend,
        )
        assert back is given


def test_images_without_pixels():
    for place in PLACES:
        x = torch.zeros(2, 3, 0, 4, device=place.device)
        t = torch.zeros(2, dtype=torch.int64, device=place.device)
        x_t, noise = q_sample(x, t, TABLE.to(place.device), seeds=t, backend=place.backend)
        assert x_t.shape == noise.shape == x.shape


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"t": torch.zeros(3, dtype=torch.int64)}, "^t must"),
        ({"t": torch.zeros(2)}, "^t must"),
        ({"table": torch.zeros(50, 3)}, "table"),
        ({"table": torch.zeros(50, 2, dtype=torch.float64)}, "table"),
        ({"noise": torch.zeros(2, 4)}, "noise"),
        ({"noise": None}, "noise and seeds"),
        ({"noise": None, "seeds": torch.zeros(1, dtype=torch.int64)}, "seeds"),
        ({"backend": "fortran"}, "fortran"),
    ],
)
def test_wrong_arguments(changes, message):
    good = {"x0": torch.zeros(2, 3), "t": torch.zeros(2, dtype=torch.int64), "table": TABLE, "noise": torch.zeros(2, 3)}
    q_sample(**good)
    with pytest.raises(ValueError, match=message):
        q_sample(**good | changes)
