"""Reading, checking, splitting and generating interaction data."""
