"""Predictions for texts and questions of the user's own: read row by row, answered chunk by chunk, resumed."""
