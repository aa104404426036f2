"""What was done and measured, in words, tables, charts and HTML pages."""
