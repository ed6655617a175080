"""One kind of metric a module: its observation of a row, and in `METRICS` the scores made of it."""
