"""The command line about itself: completion, man page and reference, all made from the parser."""
