"""The compiled inner loops of the solvers; everything else is declared in pyproject.toml."""

from pathlib import Path

from setuptools import Extension, setup

NATIVE = Path("rematerialize/solve/native")

setup(
    ext_modules=[
        Extension(
            "rematerialize.solve.native._kernel",
            sources=sorted(path.as_posix() for path in NATIVE.glob("*.c")),
            depends=[(NATIVE / "kernel.h").as_posix()],
            extra_compile_args=["-O3", "-std=c11", "-ffp-contract=off"],
            libraries=["m"],
            optional=True,  # without a compiler the solvers do without local search
        )
    ]
)
