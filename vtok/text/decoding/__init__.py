"""Decoding with drafts: several tokens a forward, and the tokens of plain `generate`."""
