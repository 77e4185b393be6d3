"""Hugging Face transformers: a cache, an attention function, and ``patch``, which puts them under a model."""
