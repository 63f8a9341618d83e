"""What people have (files, folders, hub data sets) to rows, and rows to sequences of tokens."""
