"""Which method answers for a label set, and the evidence for that choice."""
