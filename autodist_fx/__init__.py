"""Split an unmodified Hugging Face model into one torch.fx graph per rank."""
