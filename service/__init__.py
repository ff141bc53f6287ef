"""Online: a bundle in, scores out over HTTP."""
