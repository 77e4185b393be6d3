"""Crashes of record stores: SIGKILL under load, and power losses on a simulated block device."""
