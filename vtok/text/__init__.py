"""The language side: what does not look at the picture."""
