"""Decoding: other ways to choose the next tokens, through `model.generate(..., custom_generate=...)`."""
