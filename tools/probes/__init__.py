"""An architecture's score card on tasks with exact answers."""
