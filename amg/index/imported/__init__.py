"""Vectors that were embedded elsewhere."""
