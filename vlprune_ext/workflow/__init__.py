"""A method put to work on a model: prune, compare, measure, recover."""
