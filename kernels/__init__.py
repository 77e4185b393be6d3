"""Kernels: attention over pages, and the small operators around it; one operator, one folder."""
