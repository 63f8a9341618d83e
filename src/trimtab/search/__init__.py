"""The search for widths per layer under a budget in bytes: `space`, `sensitivity`, `additive`."""
