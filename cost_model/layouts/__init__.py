"""Which indices of a dim each tp rank holds, and which experts it holds alone."""
