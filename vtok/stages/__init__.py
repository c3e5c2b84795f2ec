"""Where tokens can go in a model: one file a stage, in the order in which a forward comes to them."""

ORDER = ("pixels", "patches", "blocks", "pre_llm", "prompt", "llm", "kv", "attend", "decode")
