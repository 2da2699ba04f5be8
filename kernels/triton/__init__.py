"""Triton implementations, one file for each operation; loaded only when Triton is picked."""
