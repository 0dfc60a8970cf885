"""Numerical faults: steps whose numbers cannot be, or are not likely; ranks whose memory or arithmetic has failed."""
