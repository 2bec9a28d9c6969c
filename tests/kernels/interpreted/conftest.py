"""These tests run the Triton kernels on the CPU, in a process of their own: see ../test_interpreted.py.

Kernels are interpreted only if TRITON_INTERPRET=1 is set before triton is imported; else nothing is
collected.
"""

import os

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]
