"""Layouts: the names and configs of each library, as two-way tables."""
