"""Recorded steps: one clock for all ranks, and the files made of them."""
