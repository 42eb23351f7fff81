"""Views: a program and its records as things to look at: one HTML page, notebook cells, DOT."""
