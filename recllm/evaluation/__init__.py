"""Systems on the test split, side by side: figures, intervals, tables."""
