"""Two systems on the same questions: pairing, resampling, intervals, averages."""
