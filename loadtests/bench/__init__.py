"""The engine benchmark: the reference, naive batches, vLLM and the packed engine, on the same weights and requests."""
