"""A session in a file: its bytes (docs/format.md, section 7), writing it and reading it back."""
