"""What is refused, filled in and planned before a weight is loaded or a file written."""
