"""Pages written from results."""
