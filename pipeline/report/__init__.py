"""What people look at: the terminal while a run is under way, and what it says at the end."""
