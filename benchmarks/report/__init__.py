"""Tables and pictures of the docs, from the JSON of the runs."""
