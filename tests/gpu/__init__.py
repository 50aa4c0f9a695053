"""Tests that need an NVIDIA GPU. They are run by hand: ``pytest tests/gpu``; elsewhere they are skipped.

What they compare with is ``tiny``, built here through the real command line, diffusers' pipeline and golden tensors.
"""
