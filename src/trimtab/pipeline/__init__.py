"""From a recipe to a model: the checks before it, one run, and the stages around it."""
