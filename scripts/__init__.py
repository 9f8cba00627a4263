"""Programs that are run from a checkout, and what they share; none of it is installed."""
