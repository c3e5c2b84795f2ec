"""Searches for the schedule by which decoder layers drop visual tokens: G-Search and P-Sigmoid, arXiv 2412.00556."""
