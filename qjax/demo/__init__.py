"""`make demo`: a real language model in 4 bits learns about an animal that does not exist."""
