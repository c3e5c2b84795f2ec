"""One file a method. Importing this package imports none of them; `vtok.compressor.load_all` does."""
