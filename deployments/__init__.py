"""Presets of the distillation pipeline, and what `prefect.yaml` deploys with them."""
