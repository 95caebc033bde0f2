"""Weights of other people's files: read without trust, mapped by tables, written so that their own code opens them."""
