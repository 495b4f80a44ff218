"""Architectures: one family, one file. Importing this package registers the families with timm."""
