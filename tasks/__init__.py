"""Stages and their shells: one folder a stage, `core` without torch, `engine` with it."""

from tasks.core.gpu_selection import take_card

take_card()
