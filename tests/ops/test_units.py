"""The C++ sources: each unit compiles alone, and together in any order."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from torch._inductor.cpp_builder import CppTorchOptions, get_cpp_compiler
from torch._inductor.cpu_vec_isa import pick_vec_isa

from popc.ops import measure, native


def compiler() -> str:
    try:
        path = shutil.which(get_cpp_compiler())
    except Exception:  # Inductor's own, where it finds none
        path = None
    if path is None:
        pytest.skip("there is no C++ compiler")
    return path


def check(text: str, folder: Path) -> None:
    """Compile without output, with the flags that Inductor gives."""
    command = compiler()
    (folder / "constants.h").write_text(native.constants())
    (folder / "unit.cpp").write_text(text)
    options = CppTorchOptions(vec_isa=pick_vec_isa(), warning_all=False)
    flags = [f"-{flag}" for flag in options.get_cflags()]
    flags += [f"-D{name.strip()}" for name in options.get_definitions()]
    flags += " ".join(options.get_passthrough_args()).split()
    folders = [folder, native.FOLDER, *options.get_include_dirs()]
    flags += ["-fsyntax-only", *(f"-I{name}" for name in folders)]
    ran = subprocess.run(
        [command, *flags, str(folder / "unit.cpp")], capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr[:3000]


@pytest.mark.parametrize("unit", native.units())
def test_each_unit_compiles_alone(unit: str, tmp_path: Path) -> None:
    check((native.FOLDER / unit).read_text(), tmp_path)


def test_the_order_of_units_does_not_matter(tmp_path: Path) -> None:
    assert native.source() == native.source(native.units())
    check(native.source(native.units()[::-1]), tmp_path)


def test_headers_are_included_once_and_all_are_popcs() -> None:
    text = native.source()
    assert '#include "' not in text and "#pragma once" not in text
    for header in native.FOLDER.glob("*.h"):
        whole = header.read_text()
        assert whole.count("#pragma once\n") == 1
        assert text.count(whole.splitlines()[0]) == 1, header.name


def test_constants_are_pythons() -> None:
    assert f"steady = {measure.STEADY!r};" in native.source()
    assert f"sample = {measure.SAMPLE};" in native.source()
    assert "#include <cstdint>" in native.constants()
