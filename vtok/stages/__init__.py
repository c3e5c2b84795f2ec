"""Where tokens can go in a model: one file a stage."""
