"""The tests on other versions of Python, torch and dependencies, and the page of their counts."""
