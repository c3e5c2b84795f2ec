"""Trained projectors that give fewer visual tokens, and what trains them."""
