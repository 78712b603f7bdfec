"""Services of the machine: free memory, atomic files, progress bars, terminal text, torch state."""
