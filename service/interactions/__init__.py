"""Impressions and their outcomes: taken, kept on disk, and part of the next score."""
