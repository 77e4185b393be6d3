"""Adapters between kvtier and the engines that run models."""
