"""Pages that a person looks at: report.html, comparisons, figures."""
