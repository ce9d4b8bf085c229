"""The Triton kernels of the contrastive loss run in the interpreter, in a process of its own: without one, torch knows no CPU for them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

INTERPRETED = Path(__file__).parent / "interpreted"


@pytest.mark.parametrize(
    "checks",
    [
        "check_contrastive.py",
        pytest.param("check_contrastive_adversarial.py", marks=pytest.mark.slow),
        pytest.param("check_contrastive_processes.py", marks=pytest.mark.slow),
        pytest.param("check_tuning.py", marks=pytest.mark.slow),
    ],
)
def test_triton_kernels_in_the_interpreter(checks):
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(INTERPRETED / checks)]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
