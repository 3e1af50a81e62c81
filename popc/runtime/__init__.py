"""What runs around a compiled graph: its session, partition and statistics."""
