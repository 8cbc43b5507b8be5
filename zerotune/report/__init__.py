"""Build pages for people: report.html, comparisons, figures."""
