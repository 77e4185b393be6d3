"""Which tokens stay after a prompt."""
