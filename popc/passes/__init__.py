"""Passes: each takes a captured graph and the regions of a plan, and rewrites the graph in place.

A pass keeps ``meta["val"]`` right and the graph lint-clean. Their order stands in ``popc.backend``.
"""
