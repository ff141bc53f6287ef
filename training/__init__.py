"""Offline: interactions and item titles in, one bundle out."""
