"""From predictions to scores with intervals and paired tests: the metrics of each task."""
