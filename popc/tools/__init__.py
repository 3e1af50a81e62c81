"""What the command line is made of: texts, tasks, quality."""
