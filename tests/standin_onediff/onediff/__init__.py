"""A stand-in for OneDiff, for tests on a machine without it: see infer_compiler.py."""
