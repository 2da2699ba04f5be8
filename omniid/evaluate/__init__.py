"""Measures of identity, one per file."""
