"""Memory: what a run will need, predicted before anything is loaded."""
