"""Benchmarks, none of which gates the tests."""

import os

# Before torch is imported: OpenMP threads that spin while they wait collapse beside other load (AGENTS).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
