"""Where each checkpoint layout keeps each tensor, and what its config means: data, both ways."""
