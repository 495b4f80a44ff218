"""Training and evaluation configs (package data)."""
