"""Orders of the same tasks. Importing this package loads no torch."""
