"""Model families, one file each: an adapter tells the engine where things are and names no method."""
