"""The memory plan: what a training run will need of a card, and the settings that make it fit, before it is loaded."""
