"""Passes: each takes a captured graph and the regions of a plan, and rewrites the graph in place.

A pass keeps ``meta["val"]`` right and the graph lint-clean, and changes a node in place: see
:func:`popc.passes.builder.replace`. All are run by :func:`popc.stages.run_stage`.
"""
