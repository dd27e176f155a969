"""Studies on the mini world, over several worlds and seeds, and what they share."""
