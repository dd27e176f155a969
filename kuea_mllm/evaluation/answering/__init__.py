"""From questions to answers: images prepared, batches, processes, kept as they come."""
