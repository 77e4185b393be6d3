"""Which pages leave a tier first."""
