"""One model family a module, as `FAMILY`; the table is tasks.engine.models.family_registry."""
