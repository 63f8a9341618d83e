"""What one GPU shows within eight minutes: `run.sh`."""
