"""Training: the trainer, its loss, and teachers."""
