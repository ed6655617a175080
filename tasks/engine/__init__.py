"""What stages that run torch share: loading, chat and labels, losses, the training loop."""
