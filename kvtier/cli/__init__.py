"""The command line of kvtier: one file a verb, over the same public names that Python users call."""
