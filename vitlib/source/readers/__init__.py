"""One weights file -> names and tensors, whatever it is: bounded, checked, nothing in it run."""
