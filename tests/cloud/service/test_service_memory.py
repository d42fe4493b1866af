"""The service's process keeps freed megabytes for the next upload."""

import gc
import subprocess
import sys

import pytest

SCRIPT = """
import resource
from wearfleet_cloud.service.memory import keep_freed_memory
kept = {keep} and keep_freed_memory()
def faults(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3): [bytearray(b"1") * 4_000_000 for _ in range(8)]
before = faults()
for _ in range(20): [bytearray(b"1") * 4_000_000 for _ in range(8)]
print(int(kept), faults() - before)
"""


def faults(*, keep: bool) -> tuple[int, int]:
    code = SCRIPT.replace("{keep}", str(keep))
    kept, count = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    return int(kept), int(count)


@pytest.mark.skipif(sys.platform != "linux", reason="a setting of glibc")
def test_megabytes_that_come_and_go_are_not_mapped_anew_each_time():
    kept, count = faults(keep=True)
    assert kept
    assert count < faults(keep=False)[1] / 4


def test_what_is_alive_after_the_start_is_not_collected_again():
    from wearfleet_cloud.service.memory import freeze_startup

    before = gc.get_freeze_count()
    try:
        freeze_startup()
        assert gc.get_freeze_count() > before
    finally:
        gc.unfreeze()
