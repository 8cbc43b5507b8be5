"""Labelled text: the rows of a task, how they are split, tokenised and put into prompts."""
