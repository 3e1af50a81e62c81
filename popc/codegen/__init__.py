"""Code of a rewritten graph: layers that are alike are compiled once, the rest in pieces beside."""

from popc.codegen.generate import Compiler, generate_code

__all__ = ["Compiler", "generate_code"]
