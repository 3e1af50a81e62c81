"""Passes that make a graph faster and prune nothing."""
