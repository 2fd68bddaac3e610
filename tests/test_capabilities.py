"""Every instruction-set level of the CPU library that this machine can run gives right results."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest

from adapter_ext import _C

HERE = pathlib.Path(__file__).parent
OTHERS = [level for level in _C.supported_cpu_capabilities() if level != _C.cpu_capability()]


def run(capability: str, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "ADAPTER_EXT_CPU_CAPABILITY": capability}
    return subprocess.run(
        [sys.executable, *command],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )


# The level in use is what all other tests run. CI runs all op tests at each of the others.
PROGRAM = """
import sys

import pytest

from adapter_ext import _C

if _C.cpu_capability() != sys.argv[1]:
    sys.exit(f"the level in use is {_C.cpu_capability()}")
sys.exit(pytest.main(["-x", "-p", "no:cacheprovider", "-k", "test_dtypes", sys.argv[2]]))
"""


@pytest.mark.parametrize("capability", OTHERS)
def test_other_level(capability: str) -> None:
    tests = str(HERE / "test_linear_adapter.py")
    result = run(capability, "-c", PROGRAM, capability, tests)
    assert result.returncode == 0, result.stderr + result.stdout[-3000:]
    assert "64 passed" in result.stdout


@pytest.mark.skipif(
    "ADAPTER_EXT_CPU_CAPABILITY" in os.environ, reason="a level is chosen by the environment"
)
def test_pairs_of_bfloat16_are_not_chosen_where_they_are_slow() -> None:
    """Intel's cores multiply them at half the rate of float32; their tiles are fast."""
    supported = _C.supported_cpu_capabilities()
    assert _C.cpu_capability() in supported
    facts = pathlib.Path("/proc/cpuinfo")
    if not facts.exists():
        pytest.skip("needs Linux")
    intel = "GenuineIntel" in facts.read_text()
    slow = [level for level in supported if level == "avx512_bf16" and intel]
    assert _C.cpu_capability() == [level for level in supported if level not in slow][-1]
