"""The course on the command line."""
