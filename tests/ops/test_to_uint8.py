"""to_uint8: the suite, and every byte, what is outside, its arguments."""

import pytest
import torch
from suite import OpSuite, places

from fastgen import testing
from fastgen.ops import to_uint8


class TestToUint8(OpSuite):
    op = "to_uint8"
    few = ("2x3x5x7", "2x4x33x31")
    at_size = testing._to_uint8(3, 5, 131, 127)


PLACES = places("to_uint8")


def test_bytes_survive_the_way_to_floats_and_back():
    every = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    for place in PLACES:
        back = to_uint8((every / 127.5 - 1).to(place.device), backend=place.backend)
        assert torch.equal(back.cpu().permute(0, 3, 1, 2), every)


def test_halves_go_to_even_and_what_is_outside_is_clamped():
    """In fp64, where (k + 1/2 - 127.5) / 127.5 · 127.5 + 127.5 can be a half exactly."""
    inf, nan = float("inf"), float("nan")
    values = [-inf, -7.0, -1.0, 0.0, 1.0, 7.0, inf, nan, 1 / 127.5, -1 / 127.5]
    expected = [0, 0, 0, 128, 255, 255, 255, 0, 128, 126]  # 0 -> 127.5 -> 128; 128.5 -> 128; 126.5 -> 126
    for place in PLACES:
        for dtype in (torch.float64, torch.float32, torch.float16):
            count = len(values) if dtype != torch.float16 else 8  # fp16 has no 1 / 127.5
            x = torch.tensor(values[:count], dtype=dtype, device=place.device).reshape(1, 1, 1, -1)
            assert to_uint8(x, backend=place.backend).flatten().tolist() == expected[:count]


def test_channels_move_last():
    x = torch.tensor([-1.0, 0.2, 1.0]).reshape(1, 3, 1, 1).expand(2, 3, 4, 5)
    for place in PLACES:
        y = to_uint8(x.to(place.device), backend=place.backend)
        assert y.shape == (2, 4, 5, 3) and y[1, 3, 4].tolist() == [0, 153, 255]


@pytest.mark.parametrize("x", [torch.zeros(3, 4, 4), torch.zeros(1, 3, 4, 4, dtype=torch.uint8)])
def test_wrong_arguments(x):
    with pytest.raises(ValueError, match=r"^x must"):
        to_uint8(x)
