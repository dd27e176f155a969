"""Open what lies in any format: towers, text halves, and both in their own library."""
