"""`--dry-run` of run and train: what a command would start and read, without starting a rank."""
