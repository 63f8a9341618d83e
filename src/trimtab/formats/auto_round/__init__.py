"""AutoRound's checkpoints, read."""
