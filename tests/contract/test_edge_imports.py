"""The device's package imports nothing of the cloud, whatever is installed beside it."""

import subprocess
import sys

IMPORT_ALL = """
import importlib, pkgutil, sys
import wearfleet_edge
names = [m.name for m in pkgutil.walk_packages(wearfleet_edge.__path__, "wearfleet_edge.")]
for name in names:
    importlib.import_module(name)
forbidden = ("torch", "onnx", "onnxscript", "triton", "wearfleet_cloud", "wearfleet_models")
print(len(names), sorted(m for m in sys.modules if m.split(".")[0] in forbidden))
"""


def test_importing_every_edge_module_brings_in_nothing_of_the_cloud():
    result = subprocess.run([sys.executable, "-c", IMPORT_ALL], capture_output=True, text=True, check=True)
    count, found = result.stdout.strip().split(" ", 1)
    assert int(count) > 25
    assert found == "[]"
