"""What a causal model is asked, how likely it finds an answer, and what it writes."""
