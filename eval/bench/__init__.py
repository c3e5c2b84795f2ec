"""`vtok bench`: time and memory."""
