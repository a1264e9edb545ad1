"""What scores: CRMs, LM systems, two towers, counting."""
