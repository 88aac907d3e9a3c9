"""What any pass may ask of, or do to, a torch.fx graph."""
