"""Commands that make, show, explain and compare plans."""
