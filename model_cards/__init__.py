"""Bundled checkpoints, one folder each, laid out as on the Hugging Face hub. Use `vtok.zoo.load(name)`."""
