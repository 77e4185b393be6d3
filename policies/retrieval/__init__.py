"""Which pages a query reads."""
