"""Run a script as if no device could hold the model that it evaluates: small_devices.py SCRIPT FLAGS."""

import runpy
import sys

from zerotune.models import divided

if __name__ == "__main__":
    divided.device_bytes = lambda: 1
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")
