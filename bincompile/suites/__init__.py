"""What `bincompile bench` measures: one file for each suite, and what they share."""
