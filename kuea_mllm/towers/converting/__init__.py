"""From any format to any other, with the changes asked for, and proved."""
