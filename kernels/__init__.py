"""Triton kernels: one operation a file. Imports nothing of eve."""
