"""Benchmarks of kvtier beside its peers; ``python benchmarks/run.py --list`` names them."""
