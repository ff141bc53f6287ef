"""What computes scores: the protocol, the worker process, the packed model in it."""
