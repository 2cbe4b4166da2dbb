"""One script a task, from data to a model that answers: read them from top to bottom."""
