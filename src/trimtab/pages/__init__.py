"""Pages that a browser shows: `report.html` of a run, a search or a comparison, made of the files in its folder alone."""
