"""How torch's threads share the processors with other programs: variables set before torch is imported.

After each operation OpenMP's threads wait for each other, and spin meanwhile: in GCC's library up to 14 ms,
beside busy programs on the processor that the awaited thread needs. What the user has set is left alone.
"""

import os
from collections.abc import Mapping
from pathlib import Path

_SPINS = {"GOMP_SPINCOUNT": "1000", "KMP_BLOCKTIME": "1"}
"""GCC's library: some 50 µs, as it chooses where it starts more threads than processors; LLVM's: 1 ms."""
_WAITING = {"OMP_WAIT_POLICY", *_SPINS}
_COUNTS = {"OMP_NUM_THREADS", "MKL_NUM_THREADS"}
_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def thread_settings(environment: Mapping[str, str], quota: Path = _QUOTA) -> dict[str, str]:
    """The variables to add to ``environment``: a short wait, and in a container no more threads than the
    processors that its quota (the file ``quota``) pays for, which torch does not ask."""
    added = {} if environment.keys() & _WAITING else dict(_SPINS)
    count = _paid(quota)
    if count is not None and not environment.keys() & _COUNTS and count < len(os.sched_getaffinity(0)):
        added["OMP_NUM_THREADS"] = str(count)
    return added


def _paid(quota: Path) -> int | None:
    """Whole processors, at least one; ``None`` without a quota."""
    try:
        time, period = map(int, quota.read_text().split())
    except (OSError, ValueError):  # no such file; "max 100000"
        return None
    return max(1, time // period)
