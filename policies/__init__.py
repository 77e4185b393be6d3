"""Policies: one paper, one file; the fields of a policy are its hyper-parameters."""
