"""What `make gpu` asks of the tests: that they end in time, and say what they left out."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def test_what_time_is_too_short_for_is_skipped_and_counted() -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "ops/test_to_uint8.py",
        "-k",
        "reference",
    ]
    environment = os.environ | {"FASTGEN_TEST_SECONDS": "0"}
    done = subprocess.run(command, cwd=Path(__file__).parent, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "FASTGEN_TEST_SECONDS: 0 s are over" in done.stdout and "passed" not in done.stdout
