"""One pass over a patched model: the forward, its cache, what is observed, the trace and the accounting."""
