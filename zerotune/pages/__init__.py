"""What a person looks at: report.html and the comparison, made from the files of runs."""
