"""What `vtok eval` runs, and how its folders are read."""
