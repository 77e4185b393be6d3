"""Which tokens of a prompt are run."""
