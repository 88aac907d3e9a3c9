"""The command line, `autodist-fx`: one file a subcommand."""
