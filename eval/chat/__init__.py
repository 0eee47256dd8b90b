"""Questions to a finished run about one picture, and the page of `eval.serve`."""
