"""Tell what a checkpoint is before anything is done with it."""
