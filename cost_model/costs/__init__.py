"""What things cost: hardware, compute, communication, memory."""
