"""philox_normal and philox_bits as ops; the numbers themselves are the subject of tests/test_noise.py."""

import pytest
import torch
from suite import OpSuite

from fastgen import ops, testing
from fastgen.testing import OpCase


def bits_case(images: int, n: int) -> OpCase:
    seeds = torch.arange(images) * -(2**33 + 5)
    made = {"n": n, "step": 7, "stream": int(ops.Stream.LABEL)}
    return OpCase("philox_bits", f"{images}x{n}", lambda _: {"seeds": seeds, **made})


BITS = [bits_case(3, 41), bits_case(2, 1030), bits_case(1, 1), bits_case(0, 4)]


class TestPhiloxNormal(OpSuite):
    op = "philox_normal"
    few = ("3x2x5x7", "2x1030")
    at_size = testing._philox_normal(3, 70_001)


class TestPhiloxBits(OpSuite):
    op = "philox_bits"
    few = ("3x41", "2x1030")
    at_size = bits_case(3, 70_001)

    @classmethod
    def cases(cls) -> list[OpCase]:
        return BITS


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"seeds": torch.zeros(2, 1, dtype=torch.int64)}, "seeds"),
        ({"seeds": torch.zeros(2, dtype=torch.int32)}, "seeds"),
        ({"step": -1}, "step"),
        ({"step": 2**32}, "step"),
        ({"stream": -1}, "stream"),
        ({"stream": 2**32}, "stream"),
        ({"backend": "fortran"}, "fortran"),
    ],
)
def test_wrong_arguments(changes, message):
    good = {"seeds": torch.zeros(2, dtype=torch.int64), "step": 2**32 - 1, "stream": 2**32 - 1}
    ops.philox_normal(**good, shape=(3,))
    ops.philox_bits(**good, n=3)
    with pytest.raises(ValueError, match=message):
        ops.philox_normal(**good | changes, shape=(3,))
    with pytest.raises(ValueError, match=message):
        ops.philox_bits(**good | changes, n=3)
