"""What a plan is asked to respect: pins, cuts, devices, memory."""
