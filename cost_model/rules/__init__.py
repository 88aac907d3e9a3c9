"""Op rules: the ways in which each kind of op may be sharded."""
