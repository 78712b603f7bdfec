"""Parts in place of a model's stock ones, in a new model that shares its weights."""
