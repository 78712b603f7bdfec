"""Named points of a forward: tensors read and edited by name, without hooks."""
