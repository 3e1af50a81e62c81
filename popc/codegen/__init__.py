"""Code of a rewritten graph: layers that are alike are compiled once, the rest in pieces beside."""

from popc.codegen.generate import Compiler, fits_cpp_wrapper, generate_code

__all__ = ["Compiler", "fits_cpp_wrapper", "generate_code"]
