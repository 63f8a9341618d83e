"""A recipe: everything about a run, read from YAML and validated before anything is loaded."""
