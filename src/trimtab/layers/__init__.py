"""What is put into a model: a stored weight, what is trained on it, and the two modules that hold both."""
