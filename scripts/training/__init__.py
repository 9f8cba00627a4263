"""How the demo model learned to read long texts, and what the adapter is worth."""
