"""Heads for detection and segmentation."""
