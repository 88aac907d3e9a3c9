"""verify."""
def verify(programs, plan, graph):
    pass
