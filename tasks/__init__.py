"""Stages and their shells: one folder a stage, `core` without torch, `engine` with it."""
