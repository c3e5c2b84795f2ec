"""Decoding: other ways to come to the next tokens, through `model.generate(..., custom_generate=...)`."""
