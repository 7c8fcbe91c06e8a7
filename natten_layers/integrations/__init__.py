"""Integrations with other libraries. Each module requires the library after which it is named, the package none."""
