"""Pipeline schedules as values: the order of forward and backward passes on each rank, and their simulated timeline."""
