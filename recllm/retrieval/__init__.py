"""Item vectors, and the most similar earlier events of a row's own history."""
