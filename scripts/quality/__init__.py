"""What head maps, page formats and eviction cost in answers and logits."""
