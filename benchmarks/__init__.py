"""Scripts that take figures: ``python -m benchmarks.NAME`` from the project's folder."""
