"""Fast paths that measurement proved worth it, each beside a plain torch reference."""
