"""Bridges to other libraries: each module needs the library that it is named after, the package itself needs none."""
