"""Pieces that several operators' Triton forms share: chunk tables, triangular inverses, launch helpers."""
