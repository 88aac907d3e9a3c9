"""Commands about the machine at hand."""
