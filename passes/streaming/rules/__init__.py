"""What operators do with time: every file here holds rules, which are found by themselves."""
