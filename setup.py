"""What pyproject.toml cannot say: a wheel with compiled libraries in it is for one kind of machine and any Python."""

from __future__ import annotations

from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.dist import Distribution

PREBUILT = any((Path(__file__).parent / "seqlib" / "_lib").glob("*.so"))


class Package(Distribution):
    def has_ext_modules(self) -> bool:
        return PREBUILT


class Wheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]  # the libraries know torch's stable ABI, but no Python


setup(distclass=Package, cmdclass={"bdist_wheel": Wheel})
